"""Token subsampling: only some tokens of the last scale are trained on in a step (SPEC.md section 5)."""

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import HartLossConfig


def kept_counts(positions: int, loss: HartLossConfig) -> tuple[int, ...]:
    """The few numbers of kept tokens that a run compiles for, ascending; the largest serves the smallest drop."""
    if not loss.drop_std:
        return (_num_kept(positions, loss.drop_mean, loss),)
    most = max(min(loss.min_kept, positions), positions - int(np.ceil(positions * loss.drop_min)))
    least = min(loss.min_kept, most)
    if loss.keep_counts == 1:
        return (most,)
    return tuple(sorted({round(count) for count in np.linspace(least, most, loss.keep_counts)}))


def bucket_probabilities(positions: int, loss: HartLossConfig) -> dict[int, float]:
    """How often a run's steps keep each number of tokens of `kept_counts`, by the truncated normal."""
    buckets = kept_counts(positions, loss)
    least = loss.dropped_below(loss.drop_min)
    all_of_it = loss.dropped_below(1.0) - least
    # At most `bucket` tokens are kept where more than (positions - bucket - 1) / positions of them are dropped.
    shares = (max(loss.drop_min, (positions - bucket - 1) / positions) for bucket in buckets[:-1])
    below = [(loss.dropped_below(share) - least) / all_of_it for share in shares]
    ends = [0.0, *(1 - share for share in below), 1.0]
    return {bucket: end - start for bucket, start, end in zip(buckets, ends, ends[1:], strict=False)}


def draw_num_kept(seed: int, step: int, positions: int, loss: HartLossConfig) -> int:
    """How many tokens step number `step` keeps: drawn from the truncated normal, rounded up to a bucket."""
    buckets = kept_counts(positions, loss)
    if not loss.drop_std:
        return buckets[0]
    random = np.random.default_rng((seed, step))
    dropped = np.inf
    while not loss.drop_min <= dropped <= 1:
        dropped = random.normal(loss.drop_mean, loss.drop_std)
    num_kept = _num_kept(positions, dropped, loss)
    return next((bucket for bucket in buckets if bucket >= num_kept), buckets[-1])


def _num_kept(positions: int, dropped: float, loss: HartLossConfig) -> int:
    """Of so many positions, where this share is dropped."""
    return positions - min(int(np.ceil(positions * dropped)), max(0, positions - loss.min_kept))


def draw_kept_tokens(key: jax.Array, batch: int, positions: int, count: int) -> jax.Array:
    """Which tokens each sample keeps, (B, count) int32, ascending, another set in each."""
    ranks = jnp.argsort(jax.random.uniform(key, (batch, positions)), axis=1)
    return jnp.sort(ranks[:, :count], axis=1).astype(jnp.int32)
