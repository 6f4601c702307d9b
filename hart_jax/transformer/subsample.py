"""Token subsampling: only some tokens of the last scale are trained on in a step (SPEC.md section 5)."""

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import HartLossConfig


def keep_buckets(positions: int, loss: HartLossConfig) -> tuple[int, ...]:
    """The few numbers of kept tokens that a run compiles for, ascending; the largest serves the smallest drop."""
    most = max(min(loss.min_kept, positions), positions - int(np.ceil(positions * loss.drop_min)))
    least = min(loss.min_kept, most)
    if loss.keep_counts == 1:
        return (most,)
    return tuple(sorted({round(count) for count in np.linspace(least, most, loss.keep_counts)}))


def draw_keep_count(seed: int, step: int, positions: int, loss: HartLossConfig) -> int:
    """How many tokens step number `step` keeps: drawn from the truncated normal, rounded up to a bucket."""
    random = np.random.default_rng((seed, step))
    dropped = np.inf
    while not loss.drop_min <= dropped <= 1:
        dropped = random.normal(loss.drop_mean, loss.drop_std)
    kept = positions - min(int(np.ceil(positions * dropped)), max(0, positions - loss.min_kept))
    buckets = keep_buckets(positions, loss)
    return next((bucket for bucket in buckets if bucket >= kept), buckets[-1])


def draw_kept(key: jax.Array, batch: int, positions: int, count: int) -> jax.Array:
    """Which tokens each sample keeps, (B, count) int32, ascending, another set in each."""
    ranks = jnp.argsort(jax.random.uniform(key, (batch, positions)), axis=1)
    return jnp.sort(ranks[:, :count], axis=1).astype(jnp.int32)
