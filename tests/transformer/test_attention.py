"""The attention function and its mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.transformer.attention import attention, scale_causal_segments

B, H, K = 2, 3, 4


def qkv(queries: int, keys: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, length, H, K)).astype(np.float32) for length in (queries, keys, keys)]


def one_by_one(q, k, v, ends, scale) -> np.ndarray:
    """Attention written as the loop that it means."""
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        logits = scale * k[b, : ends[i], h] @ q[b, i, h]
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, : ends[i], h] / weights.sum()
    return out


def test_segments_are_scale_causal():
    assert scale_causal_segments(5, (4, 9)) == ((5, 5), (4, 9), (9, 18))


def test_masked():
    segments = scale_causal_segments(3, (1, 4))
    q, k, v = qkv(8, 8)
    ends = [3] * 3 + [4] + [8] * 4
    out = attention(q, k, v, kv_end=segments, scale=0.3)
    np.testing.assert_allclose(out, one_by_one(q, k, v, ends, 0.3), rtol=1e-5, atol=1e-6)


def test_unmasked_with_more_keys_than_queries():
    q, k, v = qkv(2, 7)
    np.testing.assert_allclose(attention(q, k, v, scale=0.25), one_by_one(q, k, v, [7, 7], 0.25), rtol=1e-5, atol=1e-6)


def test_keys_past_the_end_do_not_matter():
    q, k, v = qkv(3, 6)
    out = attention(q, k, v, kv_end=((3, 4),), scale=1.0)
    k[:, 4:], v[:, 4:] = 100.0, 100.0
    np.testing.assert_array_equal(out, attention(q, k, v, kv_end=((3, 4),), scale=1.0))


def test_one_head_at_a_time_is_the_same(monkeypatch):
    segments = scale_causal_segments(3, (1, 4))
    q, k, v = qkv(8, 8)
    at_once = attention(q, k, v, kv_end=segments, scale=0.3)
    monkeypatch.setattr("hart_jax.transformer.attention.MAX_LOGITS_BYTES", 0)
    np.testing.assert_allclose(attention(q, k, v, kv_end=segments, scale=0.3), at_once, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near():
    q, k, v = qkv(5, 5)
    exact = attention(q, k, v, scale=0.5)
    out = attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), scale=0.5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.05)


def test_segments_must_cover_the_queries():
    q, k, v = qkv(3, 6)
    with pytest.raises(ValueError, match="does not cover the 3 queries"):
        attention(q, k, v, kv_end=((2, 6),), scale=1.0)
