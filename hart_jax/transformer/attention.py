"""The one attention function of the model. HART's mask is one number per query: it sees the keys before its end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# (number of queries, end of the keys they see), in order, for all queries.
Segments = tuple[tuple[int, int], ...]

# Larger logits are made one head at a time: at 1024 px those of all heads would take 9 GB for each picture.
MAX_LOGITS_BYTES = 2**31


def scale_causal_segments(context_tokens: int, scale_sizes: tuple[int, ...]) -> Segments:
    """The scale-causal mask: the context sees itself, a scale sees everything up to its own end.

    `scale_sizes` are the tokens present of scales 1, 2, ...:

        context  # . .
        scale 1  # # .
        scale 2  # # #
    """
    sizes = (context_tokens, *scale_sizes)
    return tuple(zip(sizes, np.cumsum(sizes).tolist(), strict=True))


def attention(
    q_BQHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, *, kv_end: Segments | None = None, scale: float
) -> jax.Array:
    """softmax(scale * q k^T) v with float32 logits; (B, Q, H, K) in the type of v.

    Args:
      kv_end: the segments of queries, each with the end of the keys it sees; None lets every query see every key.
    """
    if kv_end is not None and sum(size for size, _ in kv_end) != q_BQHK.shape[1]:
        raise ValueError(f"kv_end={kv_end} does not cover the {q_BQHK.shape[1]} queries")
    batch, queries, heads, _ = q_BQHK.shape
    attend = functools.partial(_attend, kv_end=kv_end, scale=scale)
    if 4 * batch * heads * queries * k_BMHK.shape[1] <= MAX_LOGITS_BYTES:
        return attend((q_BQHK, k_BMHK, v_BMHK))
    by_head = tuple(jnp.moveaxis(x[..., None, :], 2, 0) for x in (q_BQHK, k_BMHK, v_BMHK))
    return jnp.moveaxis(jax.lax.map(attend, by_head)[..., 0, :], 0, 2)


def _attend(qkv: tuple[jax.Array, jax.Array, jax.Array], *, kv_end: Segments | None, scale: float) -> jax.Array:
    q_BQHK, k_BMHK, v_BMHK = qkv
    logits_BHQM = jnp.einsum("bqhk,bmhk->bhqm", q_BQHK, k_BMHK, preferred_element_type=jnp.float32) * scale
    if kv_end is not None:
        end_Q = np.repeat([end for _, end in kv_end], [size for size, _ in kv_end])
        seen_QM = np.arange(k_BMHK.shape[1]) < end_Q[:, None]
        logits_BHQM = jnp.where(seen_QM, logits_BHQM, -jnp.inf)
    weights = jax.nn.softmax(logits_BHQM, axis=-1).astype(v_BMHK.dtype)
    return jnp.einsum("bhqm,bmhk->bqhk", weights, v_BMHK)
