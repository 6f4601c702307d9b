"""cuDNN's attention, for NVIDIA GPUs: one dense call for every group of segments, none of them masked.

With static ends HART's attention is exactly one dense call per scale on a prefix of the keys; small scales share one,
which needs a mask and costs little.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mask import KVEnd, Segments, segment_ends

# Segments join until they have so many queries: a call of fewer leaves a GPU idle.
MIN_QUERIES = 256


def attention(q_BQHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, *, kv_end: KVEnd, scale: float) -> jax.Array:
    """See `pallas_kernels.attention.attention`. Traced ends must be of whole samples: the same for all queries of one.

    Raises:
      NotImplementedError: traced ends of single queries, float32, or a width that cuDNN does not have.
    """
    if not has(q_BQHK):
        raise NotImplementedError(
            f"cudnn: has bfloat16 and float16, and widths that are multiples of 8 up to 128; got {q_BQHK.dtype} and "
            f"{q_BQHK.shape[-1]}; use implementation='xla'"
        )
    if kv_end is not None and not isinstance(kv_end, tuple):
        raise NotImplementedError("cudnn: the ends of keys must be static segments; use implementation='xla'")
    segments = kv_end or ((q_BQHK.shape[1], k_BMGK.shape[1]),)
    return by_groups(functools.partial(_call, scale=scale), q_BQHK, k_BMGK, v_BMGK, segments)


def by_groups(
    call: Callable[..., jax.Array], q_BQHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, segments: Segments
) -> jax.Array:
    """`call` (queries, keys, values, mask (queries, keys) or None) on each group's queries and the keys they see."""
    outs, start = [], 0
    for group in groups(segments):
        ends = segment_ends(group)
        queries, end = len(ends), int(ends.max())
        mask = None if ends.min() == end else np.arange(end) < ends[:, None]
        q = jax.lax.slice_in_dim(q_BQHK, start, start + queries, axis=1)
        outs.append(call(q, k_BMGK[:, :end], v_BMGK[:, :end], mask))
        start += queries
    return jnp.concatenate(outs, axis=1) if len(outs) > 1 else outs[0]


def has(q_BQHK: jax.Array) -> bool:
    """Whether cuDNN has this type and width of heads, on sm80 and later."""
    return q_BQHK.dtype in (jnp.bfloat16, jnp.float16) and q_BQHK.shape[-1] % 8 == 0 and q_BQHK.shape[-1] <= 128


def groups(segments: Segments) -> list[Segments]:
    """The segments in order, neighbours together up to `MIN_QUERIES`."""
    joined: list[Segments] = []
    for segment in segments:
        if joined and sum(size for size, _ in joined[-1]) < MIN_QUERIES:
            joined[-1] = (*joined[-1], segment)
        else:
            joined.append((segment,))
    return joined


def _call(
    q_BQHK: jax.Array, k_BMGK: jax.Array, v_BMGK: jax.Array, seen_QM: np.ndarray | None, scale: float
) -> jax.Array:
    """One call. cuDNN's gradient has even lengths only: another query is dropped again, another key is masked."""
    queries, keys = q_BQHK.shape[1], k_BMGK.shape[1]
    odd_queries, odd_keys = queries % 2, keys % 2
    q = jnp.pad(q_BQHK, ((0, 0), (0, odd_queries), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, odd_keys), (0, 0), (0, 0))) for x in (k_BMGK, v_BMGK))
    lengths: dict[str, Any] = {}
    mask = None
    if seen_QM is not None:
        mask = jnp.asarray(np.pad(seen_QM, ((0, odd_queries), (0, odd_keys))))[None, None]
    elif odd_keys:
        whole = jnp.full(len(q), 1, jnp.int32)
        lengths = {"query_seq_lengths": whole * q.shape[1], "key_value_seq_lengths": whole * keys}
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn", **lengths)
    return out[:, :queries]
