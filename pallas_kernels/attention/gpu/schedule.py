"""Which tiles the kernels visit, and in which order."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.tiles import tiles_of


class Schedule(NamedTuple):
    """Int32 arrays for T tiles of queries and S of keys; R is 1 or the batch.

    `order_RT` are tiles of queries, those with most work first. Each visits the first `visited_RT` tiles of keys, the
    first `whole_RT` of them without a mask. A tile of keys is visited by the first `seen_RS` of `order_RT`, of which
    the first `clean_RS` need no mask.
    """

    order_RT: Any
    visited_RT: Any
    whole_RT: Any
    seen_RS: Any
    clean_RS: Any
    end_RQ: Any


def schedule(end_RQ: Any, keys: int, query_tile: int, key_tile: int) -> Schedule:
    """The tiles that kernels visit; see `tiles.tiles_of`."""
    xp: Any = np if isinstance(end_RQ, np.ndarray) else jnp
    tiles = tiles_of(end_RQ, keys, query_tile, key_tile)
    # Among tiles that visit as many keys, one with two ends goes last: the mask that it needs is then not in the way.
    work = tiles.visited_RT * (keys // key_tile + 1) + tiles.whole_RT
    order = xp.argsort(-work, axis=-1, **({"kind": "stable"} if xp is np else {"stable": True}))
    whole = xp.take_along_axis(tiles.whole_RT, order, axis=1)
    whole = np.minimum.accumulate(whole, axis=1) if xp is np else lax.cummin(whole, axis=1)
    clean = (whole[:, None] > xp.arange(keys // key_tile)[:, None]).sum(-1)
    parts = (order, tiles.visited_RT, tiles.whole_RT, tiles.seen_RS, clean, end_RQ)
    return Schedule(*(warpgroup_rows.astype(np.int32) for warpgroup_rows in parts))
