"""Attention by tiles with its gradient: what all implementations that visit tiles have in common.

An implementation has two functions, over arrays (batch, heads, length, width) that are filled up to whole tiles:

    forward(q_BHQK, k_BGMK, v_BGMK, end_RQ, static) -> out_BHQK in the type of v, lse_BHQ float32
    backward(q, k, v, lse_BHQ, delta_BHQ, dout_BHQK, end_RQ, static) -> dq_BHQK, dk_BGMK, dv_BGMK

`end_RQ` is the end of every query's keys, a NumPy array where it is static; R is 1 or B. `lse` is log sum exp of a
row's scaled logits, infinite where it sees nothing; `delta` the row sums of dout * out. No array is (Q, M) in size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.mask import KVEnd, Layout, Segments, filled, row_ends, segment_ends


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The two functions above. `exact`: of tiles of any size, so that neither queries nor keys are filled up much."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    exact: bool = False


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known before tracing: segments of rows (None: ends are traced) and how queries became these rows.

    `interpret` runs kernels without their device.
    """

    segments: Segments | None
    layout: Layout
    scale: float
    blocks: Blocks
    interpret: bool = False


def attention(
    q_BQHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    *,
    kv_end: KVEnd,
    scale: float,
    kernels: Kernels,
    blocks: Blocks,
    interpret: bool = False,
) -> jax.Array:
    """Lays queries and keys out in tiles, (B, H, L, K), and back."""
    queries, keys = q_BQHK.shape[1], k_BMGK.shape[1]
    segments = kv_end if isinstance(kv_end, tuple) else ((queries, keys),) if kv_end is None else None
    key_multiple = 1 if kernels.exact else blocks.keys
    if segments:
        layout = Layout.aligned(segments, blocks.queries, 1 if kernels.exact else blocks.forward[1], kernels.exact)
    else:
        layout = Layout.even(queries, blocks.queries, kernels.exact)
    end_RQ = row_ends(kv_end if segments is None else segments, queries, keys)
    end_RQ = layout.pad(end_RQ, 1, mode="edge")
    if segments:
        # Static: the kernels make it anew from hashable settings.
        segments = _runs(end_RQ[0])
        end_RQ = np.zeros((1, 0), np.int32)
    q = layout.pad(jnp.swapaxes(q_BQHK, 1, 2), 2)
    k, v = (filled(jnp.swapaxes(x, 1, 2), key_multiple) for x in (k_BMGK, v_BMGK))
    out = _attend(kernels, Static(segments, layout, scale, blocks, interpret), q, k, v, jnp.asarray(end_RQ))
    return jnp.swapaxes(layout.unpad(out, 2), 1, 2)


def _runs(end_Q: np.ndarray) -> Segments:
    """Rows with the same end after one another, as segments."""
    starts = np.flatnonzero(np.diff(end_Q, prepend=-1))
    sizes = np.diff([*starts, len(end_Q)])
    return tuple((int(size), int(end_Q[start])) for start, size in zip(starts, sizes, strict=True))


def _ends(static: Static, end_RQ: jax.Array) -> Any:
    if static.segments is None:
        return end_RQ
    return segment_ends(static.segments)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels: Kernels, static: Static, q, k, v, end_RQ) -> jax.Array:
    return _attend_forward(kernels, static, q, k, v, end_RQ)[0]


def _attend_forward(kernels: Kernels, static: Static, q, k, v, end_RQ):
    def run(q, k, v, end_RQ):
        return kernels.forward(q, k, v, _ends(static, end_RQ), static)

    out, lse = _batch_under_vmap(run)(q, k, v, end_RQ)
    return out, (q, k, v, end_RQ, out, lse)


def _attend_backward(kernels: Kernels, static: Static, kept, dout):
    q, k, v, end_RQ, out, lse = kept

    def run(q, k, v, end_RQ, lse, delta, dout):
        return kernels.backward(q, k, v, lse, delta, dout, _ends(static, end_RQ), static)

    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    dq, dk, dv = _batch_under_vmap(run)(q, k, v, end_RQ, lse, delta, dout)
    return dq, dk, dv, np.zeros(end_RQ.shape, jax.dtypes.float0)


_attend.defvjp(_attend_forward, _attend_backward)


def _batch_under_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under vmap as one call of it, the mapped axis part of the batch. Its fourth argument is `end_RQ`."""

    @jax.custom_batching.custom_vmap
    def folded(*args):
        return run(*args)

    @folded.def_vmap
    def rule(size: int, batched, *args):
        batch = args[0].shape[1] if batched[0] else args[0].shape[0]

        def fold(at: int, x: jax.Array, mapped: bool) -> jax.Array:
            if at == 3 and not mapped and len(x) == 1:
                return x
            if not mapped:
                x = jnp.broadcast_to(x, (size, *x.shape))
            if at == 3 and x.shape[1] != batch:
                x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(size * x.shape[1], *x.shape[2:])

        out = _batch_under_vmap(run)(*map(fold, range(len(args)), args, batched))
        return jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return folded
