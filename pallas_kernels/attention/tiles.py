"""The tiles of the score matrix that a kernel visits; those that nobody sees are not among them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Tiles(NamedTuple):
    """Int32 arrays for T tiles of queries and S tiles of keys; R is 1, or the batch where ends differ within it.

    `visited_RT` is how many tiles of keys, from the first, each tile of queries visits; `whole_RT` how many of these
    all of its queries see in full, so that no mask is needed. `order_RT` are the tiles of queries, those that visit
    most first: the first `seen_RS` of them visit a tile of keys. Every tile visits one at least, which writes its
    result even where nothing is seen.
    """

    visited_RT: Any
    whole_RT: Any
    order_RT: Any
    seen_RS: Any


class Visits(NamedTuple):
    """Tiles one after the other, (R, N) int32: all visits of one `outer` tile follow each other, `first` to `last`.

    `count_R` are visits; what is behind them repeats the last one.
    """

    outer_RN: Any
    inner_RN: Any
    count_R: Any


def tiles_of(end_RQ: Any, keys: int, query_tile: int, key_tile: int) -> Tiles:
    """Tiles of queries with these ends (rows filled up to whole tiles), and of `keys` keys, whole tiles too."""
    xp: Any = np if isinstance(end_RQ, np.ndarray) else jnp
    end_RTq = end_RQ.reshape(len(end_RQ), -1, query_tile)
    visited = xp.maximum(1, -(-end_RTq.max(-1) // key_tile))
    # A stable order: the same in NumPy and in XLA.
    order = xp.argsort(-visited, axis=-1, **({"kind": "stable"} if xp is np else {"stable": True}))
    seen = (visited[:, None] > xp.arange(keys // key_tile)[:, None]).sum(-1)
    whole = end_RTq.min(-1) // key_tile
    return Tiles(*(part.astype(np.int32) for part in (visited, whole, order, xp.maximum(1, seen))))


def by_queries(tiles: Tiles) -> Visits:
    """For each tile of queries the tiles of keys that it visits, ascending."""
    return _flat(tiles.visited_RT, tiles.seen_RS.shape[1])


def by_keys(tiles: Tiles) -> Visits:
    """For each tile of keys the tiles of queries that visit it."""
    xp: Any = np if isinstance(tiles.order_RT, np.ndarray) else jnp
    visits = _flat(tiles.seen_RS, tiles.visited_RT.shape[1])
    return visits._replace(inner_RN=xp.take_along_axis(tiles.order_RT, visits.inner_RN, axis=1))


def _flat(counts_RT: Any, most: int) -> Visits:
    xp: Any = np if isinstance(counts_RT, np.ndarray) else jnp
    stop_RT = xp.cumsum(counts_RT, axis=1)
    count_R = stop_RT[:, -1]
    # How many there are is known where ends are; otherwise there is room for all tiles.
    length = int(count_R.max()) if xp is np else counts_RT.shape[1] * most
    step_RN = xp.minimum(xp.arange(length)[None], count_R[:, None] - 1)
    outer_RN = (stop_RT[:, None] <= step_RN[..., None]).sum(-1)
    inner_RN = step_RN - xp.take_along_axis(stop_RT - counts_RT, outer_RN, axis=1)
    return Visits(*(part.astype(np.int32) for part in (outer_RN, inner_RN, count_R)))
