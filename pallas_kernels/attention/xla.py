"""Attention by tiles in plain jnp: wherever no kernel applies, and on CPUs first of all.

A tile is some heads, some of their queries, and some keys; its logits stay in a cache. Where ends are static, a piece
of the layout sees exactly the keys before its end, in tiles of even size, and nothing is masked but where segments
share a piece. Where they are traced, each tile of queries loops over the tiles of keys that it sees. The backward pass
computes a tile's logits once for all three gradients; there keys and values lie width first, (n, K, M), as a CPU then
has no tile to transpose for their gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.flash import Kernels, Static

# Bytes of logits at a time: where the tiles of one head leave room, several heads share a tile. A CPU's fit its cache.
LOGITS_BYTES, CPU_LOGITS_BYTES = 2**25, 2**21
# Stands for a logit that is not seen: below all others, and finite, so that no difference is undefined.
UNSEEN = -1e30

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows `begin` to `begin + rows` of the queries in tiles of `tile`, and `keys` keys in `key_tiles` even tiles."""

    begin: int
    rows: int
    tile: int
    keys: int
    key_tiles: int
    masked: bool

    @property
    def key_tile(self) -> int:
        return -(-self.keys // self.key_tiles)

    def keys_of(self, x: jax.Array, axis: int) -> jax.Array:
        """The keys that the piece sees, along this axis, filled up to whole tiles."""
        missing = self.key_tile * self.key_tiles - self.keys
        x = jax.lax.slice_in_dim(x, 0, self.keys, axis=axis)
        return jnp.pad(x, [(0, missing if at == axis else 0) for at in range(x.ndim)]) if missing else x

    def seen(self, at: Any, end_q: Any) -> Any:
        """Which keys of tile number `at` queries with these ends see, (q, m); None where it is all of them."""
        return at * self.key_tile + np.arange(self.key_tile) < end_q[:, None] if self.masked else None

    def scan(self, body: Callable[..., tuple[Any, Any]], carry: Any, queries: Arrays, end_Q: Any) -> tuple[Any, Any]:
        """All tiles' `body(carry, arrays of a tile, its ends, its number of key tiles)` -> carry, (n, r, q, ...)."""
        stop = self.begin + self.rows
        tiles = self.rows // self.tile
        parts = tuple(x[:, :, self.begin : stop] for x in queries)
        end_Tq = end_Q[self.begin : stop].reshape(tiles, self.tile)

        def one(carry: Any, tile: tuple[Arrays, Any]) -> tuple[Any, Any]:
            arrays, end_q = tile
            # Where ends are static all tiles of a piece have its keys.
            count = self.key_tiles if isinstance(end_Q, np.ndarray) else -(-jnp.max(end_q) // self.key_tile)
            return body(carry, arrays, end_q, count)

        if tiles == 1:
            return one(carry, (parts, end_Tq[0]))
        split = tuple(jnp.moveaxis(x.reshape(*x.shape[:2], tiles, self.tile, *x.shape[3:]), 2, 0) for x in parts)
        carry, results = jax.lax.scan(one, carry, (split, end_Tq))
        return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:]), results)


def forward(q_BHQK, k_BGMK, v_BGMK, end_RQ, static: Static, logits_bytes: int = LOGITS_BYTES) -> Arrays:
    """See `flash`."""

    def of_heads(queries: Arrays, keys: Arrays, end_Q: Any, pieces: list[Piece]) -> tuple[Arrays, Arrays]:
        results = []
        for piece in pieces:
            k, v = (piece.keys_of(x, 1) for x in keys)

            def of_rows(_, arrays, end_q, count, piece=piece, k=k, v=v):
                q, factor = _scaled(arrays[0], static.scale)
                rows = q.shape[:3]
                start = (
                    jnp.full(rows, UNSEEN, jnp.float32),
                    jnp.zeros(rows, jnp.float32),
                    jnp.zeros(q.shape, jnp.float32),
                )

                def visit(at, carry):
                    most, total, acc = carry
                    logits = _dot("nrqk,nmk->nrqm", q, _tile(k, at, piece, 1)) * factor
                    seen = piece.seen(at, end_q)
                    if seen is not None:
                        logits = jnp.where(seen, logits, UNSEEN)
                    new_most = jnp.maximum(most, logits.max(-1))
                    weights = jnp.exp(logits - new_most[..., None])
                    if seen is not None:
                        weights = jnp.where(seen, weights, 0.0)
                    shrink = jnp.exp(most - new_most)
                    product = _dot("nrqm,nmk->nrqk", weights.astype(v.dtype), _tile(v, at, piece, 1))
                    return new_most, total * shrink + weights.sum(-1), acc * shrink[..., None] + product

                most, total, acc = _loop(count, visit, start)
                safe = jnp.where(total > 0, total, 1.0)
                lse = jnp.where(total > 0, most + jnp.log(safe), jnp.inf)
                return (), ((acc / safe[..., None]).astype(v.dtype), lse)

            results.append(piece.scan(of_rows, (), queries, end_Q)[1])
        return _joined(results), ()

    return _by_heads(of_heads, (q_BHQK,), (k_BGMK, v_BGMK), end_RQ, static, logits_bytes)


def backward(
    q_BHQK,
    k_BGMK,
    v_BGMK,
    lse_BHQ,
    delta_BHQ,
    dout_BHQK,
    end_RQ,
    static: Static,
    logits_bytes: int = LOGITS_BYTES,
) -> Arrays:
    """See `flash`."""

    def of_heads(queries: Arrays, keys: Arrays, end_Q: Any, pieces: list[Piece]) -> tuple[Arrays, Arrays]:
        results = []
        gradients = [jnp.zeros(x.shape, jnp.float32) for x in keys]
        for piece in pieces:
            k, v = (piece.keys_of(x, 2) for x in keys)

            def of_rows(carry, arrays, end_q, count, piece=piece, k=k, v=v):
                q, lse, delta, dout = arrays
                q, factor = _scaled(q, static.scale)

                def visit(at, carry):
                    dq, dk, dv = carry
                    k_tile, v_tile = _tile(k, at, piece, 2), _tile(v, at, piece, 2)
                    weights = jnp.exp(_dot("nrqk,nkm->nrqm", q, k_tile) * factor - lse[..., None])
                    seen = piece.seen(at, end_q)
                    if seen is not None:
                        weights = jnp.where(seen, weights, 0.0)
                    dv = _add(dv, at, piece, _dot("nrqk,nrqm->nkm", dout, weights.astype(v.dtype)))
                    dlogits = weights * (_dot("nrqk,nkm->nrqm", dout, v_tile) - delta[..., None])
                    dlogits = dlogits.astype(k.dtype)
                    dk = _add(dk, at, piece, _dot("nrqk,nrqm->nkm", q, dlogits) * factor)
                    return dq + _dot("nrqm,nkm->nrqk", dlogits, k_tile), dk, dv

                dq, *carry = _loop(count, visit, (jnp.zeros(q.shape, jnp.float32), *carry))
                return tuple(carry), ((dq * static.scale).astype(q.dtype),)

            carry = tuple(piece.keys_of(x, 2) for x in gradients)
            carry, result = piece.scan(of_rows, carry, queries, end_Q)
            results.append(result)
            gradients = [
                x.at[..., : piece.keys].set(part[..., : piece.keys]) for x, part in zip(gradients, carry, strict=True)
            ]
        return _joined(results), tuple(x.astype(key.dtype) for x, key in zip(gradients, keys, strict=True))

    width_first = tuple(jnp.swapaxes(x, 2, 3) for x in (k_BGMK, v_BGMK))
    rows = q_BHQK, lse_BHQ, delta_BHQ, dout_BHQK
    of_q, *of_keys = _by_heads(of_heads, rows, width_first, end_RQ, static, logits_bytes)
    return of_q, *(jnp.swapaxes(x, 2, 3) for x in of_keys)


KERNELS = Kernels(forward, backward, exact=True)
CPU_KERNELS = Kernels(
    functools.partial(forward, logits_bytes=CPU_LOGITS_BYTES),
    functools.partial(backward, logits_bytes=CPU_LOGITS_BYTES),
    exact=True,
)


def _by_heads(
    of_heads: Callable[..., Any], queries: Arrays, keys: Arrays, end_RQ: Any, static: Static, logits_bytes: int
) -> Arrays:
    """`of_heads` for as many heads at a time as share a tile.

    It takes queries (n, r, Q, ...), keys as these are without samples, ends and pieces, and returns two tuples of
    arrays of these forms.
    """
    batch, groups = keys[0].shape[:2]
    repeats = queries[0].shape[1] // groups
    # The other axis of these two is the width.
    length = math.prod(keys[0].shape[2:]) // queries[0].shape[3]
    pieces = _pieces(end_RQ, length, static)
    tile_bytes = max(4 * repeats * piece.tile * piece.key_tile for piece in pieces)
    # Samples with ends of their own are computed one by one.
    rounds = len(end_RQ)
    heads = batch // rounds * groups
    at_once = max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * tile_bytes <= logits_bytes))

    def split(x: jax.Array, *axes: int) -> jax.Array:
        return x.reshape(rounds, heads // at_once, at_once, *axes, *x.shape[2:])

    parts = tuple(split(x, repeats) for x in queries), tuple(split(x) for x in keys)
    of_queries, of_keys = _map(
        lambda sample: _map(lambda part: of_heads(*part, sample[1], pieces), sample[0]), (parts, end_RQ)
    )
    return (
        *(x.reshape(batch, groups * repeats, *x.shape[4:]) for x in of_queries),
        *(x.reshape(batch, groups, *x.shape[3:]) for x in of_keys),
    )


def _map(function: Callable[[Any], Any], xs: Any) -> Any:
    """`jax.lax.map`, but a single element is no loop, and keeps what is static."""
    if len(jax.tree.leaves(xs)[0]) == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], xs)))
    return jax.lax.map(function, xs)


def _pieces(end_RQ: Any, keys: int, static: Static) -> list[Piece]:
    most_rows, most_keys = static.blocks.queries, static.blocks.forward[1]
    pieces, begin = [], 0
    for _, queries, rows in static.layout.pieces:
        end, masked = keys, True
        if isinstance(end_RQ, np.ndarray):
            ends = end_RQ[0, begin : begin + rows]
            end, masked = int(ends.max()), ends.min() < ends.max()
        tile, key_tiles = rows // -(-queries // most_rows), -(-end // most_keys)
        pieces.append(Piece(begin, rows, tile, end, key_tiles, masked or end % key_tiles > 0))
        begin += rows
    return pieces


def _loop(count: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`count` rounds of `carry = body(at, carry)`."""
    return body(0, carry) if isinstance(count, int) and count == 1 else jax.lax.fori_loop(0, count, body, carry)


def _tile(x: jax.Array, at: Any, piece: Piece, axis: int) -> jax.Array:
    if piece.key_tiles == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, at * piece.key_tile, piece.key_tile, axis=axis)


def _add(x_nKM: jax.Array, at: Any, piece: Piece, more: jax.Array) -> jax.Array:
    more = _tile(x_nKM, at, piece, 2) + more
    return more if piece.key_tiles == 1 else jax.lax.dynamic_update_slice_in_dim(x_nKM, more, at * piece.key_tile, 2)


def _scaled(q: jax.Array, scale: float) -> tuple[jax.Array, float]:
    """q times the scale, where that rounds nothing that matters, and the factor that is left for the logits."""
    if q.dtype == jnp.float32 or math.frexp(scale)[0] == 0.5:
        return (q * scale).astype(q.dtype), 1.0
    return q, scale


def _joined(results: list[Arrays]) -> Arrays:
    return tuple(jnp.concatenate(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*results, strict=True))


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product summed in float32; float32 factors are not rounded."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)
