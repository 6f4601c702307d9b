"""The one attention function of the model. HART's mask is one number per query: it sees the keys before its end."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.layers import parts

# (number of queries, end of the keys they see), in order, for all queries.
Segments = tuple[tuple[int, int], ...]

# Float32 logits that one device holds at a time: few enough for a TPU's on-chip memory, which spares the main one.
MAX_LOGITS_BYTES = 2**25
# Products of fewer rows leave a chip idle.
MIN_QUERIES_AT_ONCE = 128
# Segments join until they have so many queries: the logits that are masked then cost little.
MIN_QUERIES = 512


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
    outs, start = [], 0
    for group in _groups(kv_end or ((q_BQHK.shape[1], k_BMHK.shape[1]),)):
        queries, end = sum(size for size, _ in group), group[-1][1]
        end_Q = np.repeat([end for _, end in group], [size for size, _ in group])
        q_part = jax.lax.slice_in_dim(q_BQHK, start, start + queries, axis=1)
        outs.append(_by_blocks(q_part, k_BMHK[:, :end], v_BMHK[:, :end], end_Q, scale))
        start += queries
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def _groups(segments: Segments) -> list[Segments]:
    """The segments in order, neighbours together up to `MIN_QUERIES`; a group sees the keys before its last end."""
    groups: list[Segments] = []
    for segment in segments:
        if groups and sum(size for size, _ in groups[-1]) < MIN_QUERIES:
            groups[-1] = (*groups[-1], segment)
        else:
            groups.append((segment,))
    return groups


def _by_blocks(q_BQHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, end_Q: np.ndarray, scale: float) -> jax.Array:
    """Attention of as many heads and queries at a time as `MAX_LOGITS_BYTES` allows, on every device of the mesh.

    The backward pass computes a block's logits again.
    """
    batch, queries, heads, width = q_BQHK.shape
    split = parts("heads")
    rows = MAX_LOGITS_BYTES * parts("batch") // (4 * batch * k_BMHK.shape[1])
    if heads // split * queries <= rows:
        return _attend(q_BQHK, k_BMHK, v_BMHK, end_Q, scale)
    count = math.ceil(queries / max(rows, MIN_QUERIES_AT_ONCE))
    block = math.ceil(queries / count)
    filled = count * block - queries
    rounds = next(
        n for n in range(1, heads + 1) if heads // split % n == 0 and heads // split // n <= max(1, rows // block)
    )

    def by_rounds(x_BLHK: jax.Array) -> jax.Array:
        """(rounds, B, L, heads of one round, K): every device has its own heads in each round."""
        x = jnp.moveaxis(x_BLHK.reshape(batch, -1, split, rounds, heads // split // rounds, width), 3, 0)
        x = x.reshape(rounds, batch, -1, heads // rounds, width)
        return nn.with_logical_constraint(x, (None, "batch", None, "heads", None))

    attend = jax.checkpoint(functools.partial(_attend, scale=scale), prevent_cse=False)

    def one_round(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = qkv
        q_NBQHK = jnp.moveaxis(q.reshape(batch, count, block, -1, width), 1, 0)
        out = jax.lax.map(lambda part: attend(part[0], k, v, part[1]), (q_NBQHK, end_NQ))
        return jnp.moveaxis(out, 0, 1).reshape(q.shape)

    end_NQ = jnp.asarray(np.pad(end_Q, (0, filled), mode="edge").reshape(count, block))
    q_BQHK = jnp.pad(q_BQHK, ((0, 0), (0, filled), (0, 0), (0, 0)))
    out = jax.lax.map(one_round, (by_rounds(q_BQHK), by_rounds(k_BMHK), by_rounds(v_BMHK)))
    out = jnp.moveaxis(out.reshape(rounds, batch, -1, split, heads // split // rounds, width), 0, 3)
    return out.reshape(batch, -1, heads, width)[:, :queries]


def _attend(q_BQHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, end_Q: Any, scale: float) -> jax.Array:
    """Logits of all queries, each of which sees the keys before its end."""
    logits_BHQM = jnp.einsum("bqhk,bmhk->bhqm", q_BQHK, k_BMHK, preferred_element_type=jnp.float32) * scale
    if not isinstance(end_Q, np.ndarray) or end_Q.min() < k_BMHK.shape[1]:
        seen_QM = np.arange(k_BMHK.shape[1]) < end_Q[:, None]
        logits_BHQM = jnp.where(seen_QM, logits_BHQM, -jnp.inf)
    weights = jax.nn.softmax(logits_BHQM, axis=-1).astype(v_BMHK.dtype)
    return jnp.einsum("bhqm,bmhk->bqhk", weights, v_BMHK)
