"""The meaning of attention, in plain jnp and float32; every other implementation is tested against it."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import KVEnd, row_ends


def attention(q_BQHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, *, kv_end: KVEnd, scale: float) -> jax.Array:
    """softmax(scale q k^T) v over the keys before each query's end; the (B, H, Q, M) logits are all in memory.

    HART's mask, with a context and two scales as segments ((2, 2), (1, 3), (3, 6)):

        keys        0 1 2 3 4 5
        context     # # . . . .
                    # # . . . .
        scale 1     # # # . . .
        scale 2     # # # # # #
                    # # # # # #
                    # # # # # #
    """
    q, k, v = (x.astype(jnp.float32) for x in (q_BQHK, k_BMGK, v_BMGK))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    end_RQ: Any = row_ends(kv_end, q.shape[1], k.shape[1])
    seen_RQM = jnp.arange(k.shape[1]) < end_RQ[..., None]
    logits = jnp.einsum("bqhk,bmhk->bhqm", q, k, precision="highest") * scale
    # A query that sees nothing gets zeros.
    weights = jnp.where(seen_RQM[:, None], jax.nn.softmax(jnp.where(seen_RQM[:, None], logits, -1e30), axis=-1), 0.0)
    out = jnp.einsum("bhqm,bmhk->bqhk", weights, v, precision="highest")
    return out.astype(v_BMGK.dtype)
