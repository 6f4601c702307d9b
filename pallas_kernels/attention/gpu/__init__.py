"""Attention by tiles on Hopper (sm90): Pallas Mosaic GPU kernels for the output, for dQ, and for dK and dV.

A program is two compute warpgroups (three where a tile of queries is a multiple of 192, one where it is 64) and one
that copies tiles from global memory ahead of them, after FlashAttention-3 (Shah et al. 2024). A warpgroup owns
tile / warpgroups rows of the scores: queries in the forward pass and in dQ, keys in dK and dV, where scores are
transposed, so that what goes into the second product is in registers each time. While the tensor cores multiply the
weights of one tile, the warpgroup works on the scores of the next.

Tiles past a tile's key end are in no loop; masks are in the loops over boundary tiles only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.flash import Kernels, Static
from pallas_kernels.attention.gpu.dkv import dkv
from pallas_kernels.attention.gpu.dq import dq
from pallas_kernels.attention.gpu.forward import forward
from pallas_kernels.attention.gpu.warpgroups import LOG2E


def _widened(*arrays: jax.Array) -> list[jax.Array]:
    """With zeros up to a multiple of 16 in the last axis, which is what products take."""
    missing = -arrays[0].shape[-1] % 16
    return [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x for x in arrays]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, end_RQ: Any, static: Static) -> tuple[jax.Array, jax.Array]:
    q_wide, k_wide, v_wide = _widened(q, k, v)
    out, lse = forward(q_wide, k_wide, v_wide, end_RQ, static)
    return out[..., : q.shape[-1]], lse


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    end_RQ: Any,
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    width = q.shape[-1]
    q, k, v, dout = _widened(q, k, v, dout)
    args = q, k, v, dout, lse * LOG2E, delta
    grads = dq(args, end_RQ, static), *dkv(args, end_RQ, static)
    q_grad, k_grad, v_grad = (x[..., :width] for x in grads)
    return q_grad, k_grad, v_grad


KERNELS = Kernels(_forward, _backward)
