"""Many rows of a batch, a few of each device at a time, where memory does not hold what all need."""

from collections.abc import Callable
from typing import Any

import jax
from einops import rearrange

from hart_jax.nn.layers import num_shards, shard_batch


def in_rounds(compute: Callable[[Any], Any], rows: Any, at_once: int) -> Any:
    """`compute` of rows, at most `at_once` of each device at a time, one round after the other.

    Args:
      compute: arrays (b, ...), or trees of them, to arrays (b, ...); each row depends on its own alone.
      rows: arrays (B, ...); B is a multiple of the parts that the devices share a batch in.
      at_once: rows of a device in a round; fewer where these do not divide its share of the batch.

    Returns:
      what `compute` gives for all B rows, split as a batch is.
    """
    batch, devices = len(jax.tree.leaves(rows)[0]), num_shards("batch")
    each = batch // devices
    rounds = next(count for count in range(1, each + 1) if each % count == 0 and each // count <= at_once)
    if rounds == 1:
        return compute(rows)

    def to_rounds(x: jax.Array) -> jax.Array:
        return rearrange(x, "(devices rounds b) ... -> rounds (devices b) ...", devices=devices, rounds=rounds)

    def from_rounds(x: jax.Array) -> jax.Array:
        return shard_batch(rearrange(x, "rounds (devices b) ... -> (devices rounds b) ...", devices=devices))

    done = jax.lax.map(lambda part: compute(jax.tree.map(shard_batch, part)), jax.tree.map(to_rounds, rows))
    return jax.tree.map(from_rounds, done)
