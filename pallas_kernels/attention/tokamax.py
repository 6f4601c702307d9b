"""The kernels of the package tokamax for NVIDIA GPUs of sm90 and sm100, given HART's mask.

Its public function takes an end of keys for each sample; the operation below that takes one for each query. The forward
kernel visits no tile past it; the kernels of the gradients visit all tiles and mask them (0.0.17).
"""

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import KVEnd, row_ends

# Its operations are no public interface, so that the version counts: extra `gpu`.
VERSION = "0.0.17"
_OPS = "tokamax._src.ops.attention"


def attention(
    q_BQHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, *, kv_end: KVEnd, scale: float, interpret: bool = False
) -> jax.Array:
    """See `pallas_kernels.attention.attention`; with `interpret` the package's plain attention, given the same mask.

    Raises:
      NotImplementedError: float32, a width that the kernels lack, or the package is not installed.
    """
    if not has(q_BQHK):
        raise NotImplementedError(
            f"tokamax: has bfloat16 and float16, and widths that are multiples of 8 up to 128; got {q_BQHK.dtype} and "
            f"{q_BQHK.shape[-1]}; use implementation='xla'"
        )
    if not installed():
        raise NotImplementedError(
            f"tokamax: the package is not installed (pip install tokamax=={VERSION}, Python 3.12 or newer); use "
            "implementation='cudnn'"
        )
    base = importlib.import_module(f"{_OPS}.base")
    kernels = importlib.import_module(f"{_OPS}.pallas_mosaic_gpu")
    operation: Any = base.DotProductAttention() if interpret else kernels.PallasMosaicGpuFlashAttention()
    if kv_end is None:
        return operation(q_BQHK, k_BMGK, v_BMGK, logits_scale=scale)
    end_RQ = jnp.asarray(row_ends(kv_end, q_BQHK.shape[1], k_BMGK.shape[1]))
    # A softmax over no key at all is not a number: such a query sees one, and what comes of it is dropped.
    mask = base.Mask(k_end=jnp.maximum(end_RQ, 1)[:, None])
    out = operation(q_BQHK, k_BMGK, v_BMGK, logits_scale=scale, mask=mask)
    return out if isinstance(kv_end, tuple) else jnp.where(end_RQ[:, :, None, None] > 0, out, 0)


def has(q_BQHK: jax.Array) -> bool:
    """Whether the kernels have this type and width of heads."""
    return q_BQHK.dtype in (jnp.bfloat16, jnp.float16) and q_BQHK.shape[-1] % 8 == 0 and q_BQHK.shape[-1] <= 128


def installed() -> bool:
    return importlib.util.find_spec("tokamax") is not None
