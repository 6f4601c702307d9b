"""The attention function and its mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.training.flops import flops_of
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


@pytest.mark.parametrize(
    ("limit", "at_once", "joined"),
    [(2**25, 128, 1), (2**25, 128, 4), (0, 1, 512), (0, 3, 512), (4 * B * 8 * 2 * 5, 2, 1), (4 * B * 8 * 3, 3, 5)],
    ids=["each scale", "joined scales", "single rows", "padded blocks", "blocks of scales", "two heads"],
)
def test_however_it_is_divided_it_is_the_same(monkeypatch, limit, at_once, joined):
    segments = scale_causal_segments(3, (1, 4))
    q, k, v = qkv(8, 8)

    def loss(q, k, v):
        out = attention(q, k, v, kv_end=segments, scale=0.3)
        return jnp.sum(jnp.sin(out)), out

    both = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    at_once_gradients, expected = both(q, k, v)
    for name, value in {"MAX_LOGITS_BYTES": limit, "MIN_QUERIES_AT_ONCE": at_once, "MIN_QUERIES": joined}.items():
        monkeypatch.setattr(f"hart_jax.transformer.attention.{name}", value)
    gradients, out = jax.jit(both)(q, k, v)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, at_once_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_scale_costs_only_the_keys_that_it_sees(monkeypatch):
    segments = scale_causal_segments(3, (1, 4))
    q, k, v = qkv(8, 8)
    for joined, pairs in {512: 8 * 8, 1: 3 * 3 + 4 + 4 * 8}.items():
        monkeypatch.setattr("hart_jax.transformer.attention.MIN_QUERIES", joined)
        traced = jax.make_jaxpr(lambda *qkv: attention(*qkv, kv_end=segments, scale=0.3))(q, k, v)
        assert flops_of(traced.jaxpr) == 4 * B * H * K * pairs


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
