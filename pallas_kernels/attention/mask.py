"""Which keys each query sees: those before its end. Queries are laid out in tiles so that ends within one are alike."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# (number of queries, end of the keys that they see), in order, for all queries.
Segments = tuple[tuple[int, int], ...]
# Static segments, or a traced end for every query, (Q,) or (B, Q) int32; None lets every query see every key.
KVEnd = Segments | jax.Array | None
# Pairs of query and key that take as long as a piece of its own costs.
PIECE = 2**17


def segment_ends(segments: Segments) -> np.ndarray:
    """The end of every query of these segments, (Q,) int32."""
    return np.repeat([end for _, end in segments], [size for size, _ in segments]).astype(np.int32)


def row_ends(kv_end: KVEnd, queries: int, keys: int) -> Any:
    """The end of every query, (1 or B, Q) int32 in 0..keys; a NumPy array where it is known before tracing."""
    if kv_end is None:
        return np.full((1, queries), keys, np.int32)
    if isinstance(kv_end, tuple):
        return segment_ends(kv_end)[None]
    end = jnp.clip(kv_end, 0, keys).astype(jnp.int32)
    return end if end.ndim == 2 else end[None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Queries as rows of tiles: `pieces` of (start, queries, rows), each filled up to whole tiles.

    `exact` tiles share the queries of their piece evenly, so that hardly a row is added; others are all as large.
    """

    pieces: tuple[tuple[int, int, int], ...]

    @classmethod
    def even(cls, queries: int, tile: int, exact: bool = False) -> "Layout":
        """All queries in one piece."""
        return cls(((0, queries, _rows(queries, tile, exact)),))

    @classmethod
    @functools.lru_cache(maxsize=256)
    def aligned(cls, segments: Segments, tile: int, key_tile: int, exact: bool = False) -> "Layout":
        """The cuts between segments that need the fewest tiles of (`tile` queries, `key_tile` keys).

        A tile that two segments share is visited as far as the longer one sees; a cut fills up the tile before it.
        With `exact` tiles all of a piece is, and a piece more has to spare `PIECE` pairs.
        """
        starts = [0, *itertools.accumulate(size for size, _ in segments)]

        def visited(first: int, last: int) -> int:
            if exact:
                rows = _rows(starts[last] - starts[first], tile, exact)
                return rows * max(end for _, end in segments[first:last]) + PIECE
            total = 0
            for at in range(starts[first], starts[last], tile):
                inside = [n for n in range(first, last) if starts[n] < at + tile and starts[n + 1] > at]
                total += -(-max(segments[n][1] for n in inside) // key_tile)
            return total

        best: list[tuple[int, tuple[int, ...]]] = [(0, (0,))]
        for last in range(1, len(segments) + 1):
            options = [(best[n][0] + visited(n, last), (*best[n][1], last)) for n in range(last)]
            best.append(min(options, key=lambda option: (option[0], len(option[1]))))
        pieces = []
        for first, last in itertools.pairwise(best[-1][1]):
            queries = starts[last] - starts[first]
            pieces.append((starts[first], queries, _rows(queries, tile, exact)))
        return cls(tuple(pieces))

    @property
    def rows(self) -> int:
        return sum(rows for _, _, rows in self.pieces)

    def pad(self, x: Any, axis: int, mode: str = "constant") -> Any:
        """Queries to rows; those added are zero, or with mode "edge" like the last of their piece."""
        xp: Any = np if isinstance(x, np.ndarray) else jnp
        filled = []
        for start, queries, rows in self.pieces:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, rows - queries)
            part = x[(slice(None),) * axis + (slice(start, start + queries),)]
            filled.append(xp.pad(part, widths, mode=mode) if rows > queries else part)
        return xp.concatenate(filled, axis) if len(filled) > 1 else filled[0]

    def unpad(self, x: Any, axis: int) -> Any:
        """Rows back to queries."""
        xp: Any = np if isinstance(x, np.ndarray) else jnp
        parts, begin = [], 0
        for _, queries, rows in self.pieces:
            parts.append(x[(slice(None),) * axis + (slice(begin, begin + queries),)])
            begin += rows
        return xp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def filled(x_BGMK: jax.Array, multiple: int) -> jax.Array:
    """Keys or values with zeros up to a multiple of a tile's length."""
    missing = -x_BGMK.shape[2] % multiple
    return jnp.pad(x_BGMK, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else x_BGMK


def _rows(queries: int, tile: int, exact: bool) -> int:
    tiles = -(-queries // tile)
    return tiles * (-(-queries // tiles) if exact else tile)
