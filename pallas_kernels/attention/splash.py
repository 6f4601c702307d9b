"""JAX's own splash attention for TPUs, given HART's mask: to compare with, and to fall back on. Static ends only."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    make_splash_mha_single_device,
)

from pallas_kernels.attention.blocks import Blocks
from pallas_kernels.attention.mask import KVEnd, Layout, filled, row_ends


class _Ends(Mask):
    """Each row sees the keys before its end; rows that were added see what the last one does."""

    def __init__(self, end_Q: np.ndarray, keys: int):
        self._end_Q, self._keys = end_Q, keys

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self._end_Q), self._keys

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, keys = index
        return np.arange(self._keys)[keys] < self._end_Q[rows, None]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Ends) and self.shape == other.shape and np.array_equal(self._end_Q, other._end_Q)

    def __hash__(self) -> int:
        return hash((self.shape, self._end_Q.tobytes()))


def attention(
    q_BQHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    *,
    kv_end: KVEnd,
    scale: float,
    blocks: Blocks,
    interpret: bool = False,
) -> jax.Array:
    """See `pallas_kernels.attention.attention`; `NotImplementedError` for traced ends."""
    if kv_end is not None and not isinstance(kv_end, tuple):
        raise NotImplementedError("splash: the ends of keys must be static segments; use implementation='xla'")
    queries, keys = q_BQHK.shape[1], k_BMGK.shape[1]
    layout = Layout.even(queries, blocks.queries)
    q = layout.pad(jnp.swapaxes((q_BQHK.astype(jnp.float32) * scale).astype(q_BQHK.dtype), 1, 2), 2)
    repeats = q_BQHK.shape[2] // k_BMGK.shape[2]
    k, v = (filled(jnp.swapaxes(jnp.repeat(x, repeats, axis=2), 1, 2), blocks.keys) for x in (k_BMGK, v_BMGK))
    end_RQ = layout.pad(row_ends(kv_end, queries, keys), 1, mode="edge")
    mask = MultiHeadMask([_Ends(end_RQ[0], k.shape[2])] * q_BQHK.shape[2])
    sizes = BlockSizes(
        block_q=blocks.forward[0],
        block_kv=blocks.forward[1],
        block_kv_compute=blocks.forward[1],
        block_q_dkv=blocks.dkv[0],
        block_kv_dkv=blocks.dkv[1],
        block_kv_dkv_compute=blocks.dkv[1],
        block_q_dq=blocks.dq[0],
        block_kv_dq=blocks.dq[1],
    )
    kernel = make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    return jnp.swapaxes(layout.unpad(jax.vmap(kernel)(q, k, v), 2), 1, 2).astype(v_BMGK.dtype)
