"""Digests of arrays: 32 bits of each that any flipped bit changes, the same on every mesh, and on the host.

Every element is mixed with its place in the array and all are added up, so that parts of an array on many devices give
the digest of the whole, and no device reads more than its own part.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hart_jax.checkpoints.damage import Damaged

# Elements that the host mixes at a time: they stay in its caches.
_AT_ONCE = 1 << 18


def array_digests(tree: Any, copies: bool = False) -> dict[str, int]:
    """The digest of every array of a tree, by its path ("params.layer.kernel").

    Every device reads its own part, once. Several processes must call it together.

    Args:
      copies: looks at every copy of what lies on several devices, not only at the first.

    Raises:
      Damaged: copies of one array differ.
    """
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    counts = [_copies_of(array) if copies else 1 for array in arrays]
    parts = jax.device_get([_parts(array, copies) for array in arrays])
    # The parts with the same number of copy make up the whole array.
    sums = np.zeros((len(names), max(counts)), np.uint32)
    for row, part in zip(sums, parts, strict=True):
        for copy, digest in part:
            row[copy] = (int(row[copy]) + int(digest)) % 2**32
    gathered = np.reshape(multihost_utils.process_allgather(sums), (-1, *sums.shape))
    totals = np.asarray(np.sum(gathered, axis=0, dtype=np.uint32))
    for name, row, count in zip(names, totals, counts, strict=True):
        if len(set(row[:count].tolist())) > 1:
            raise Damaged(f"array {name}: its copies on several devices differ")
    return dict(zip(names, totals[:, 0].tolist(), strict=True))


def host_digest(array: np.ndarray) -> int:
    """The digest of an array on the host: what `array_digests` gives for it."""
    flat = np.ascontiguousarray(array).reshape(-1)
    flat = flat.view(np.uint8 if flat.dtype == bool else f"u{min(flat.itemsize, 4)}")
    total = 0
    for start in range(0, flat.size, _AT_ONCE):
        bits = flat[start : start + _AT_ONCE].astype(np.uint32)
        place = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(_mixed(bits, place, np.uint32), dtype=np.uint64))
    return total % 2**32


def check_digests(found: Mapping[str, int], stored: Mapping[str, int]) -> None:
    """Raises `Damaged`, naming the arrays, where digests differ or are not stored."""
    wrong = [name for name, digest in found.items() if stored.get(name) != digest]
    if wrong:
        raise Damaged(f"array {', '.join(wrong[:3])}: not what was saved, by its digest")


def _copies_of(array: jax.Array) -> int:
    part = math.prod(array.sharding.shard_shape(array.shape))
    return len(array.sharding.device_set) * part // array.size if array.size else 1


def _parts(array: jax.Array, copies: bool) -> list[tuple[int, jax.Array]]:
    """The digests of this process's parts of an array, each with the number of the copy that it belongs to."""
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    found = []
    for shard in array.addressable_shards:
        if shard.replica_id < (_copies_of(array) if copies else 1):
            starts = [part.indices(size)[0] for part, size in zip(shard.index, array.shape, strict=True)]
            place = np.asarray([starts, strides], np.uint64).astype(np.uint32)
            found.append((shard.replica_id, _digest(shard.data, place)))
    return found


@jax.jit
def _digest(part: jax.Array, place: jax.Array) -> jax.Array:
    """Of a part of an array, whose `place` has along each axis its start, and the array's stride."""
    if part.dtype == bool:
        part = part.astype(jnp.uint8)
    words = max(1, part.dtype.itemsize // 4)
    # Of wide elements, the halves become a last axis.
    bits = jax.lax.bitcast_convert_type(part, jnp.dtype(f"u{min(part.dtype.itemsize, 4)}")).astype(jnp.uint32)
    number = jnp.zeros((), jnp.uint32)
    for axis in range(part.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        number = number + (along + place[0, axis]) * place[1, axis] * jnp.uint32(words)
    if words > 1:
        number = number + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, part.ndim)
    return jnp.sum(_mixed(bits, number, jnp.uint32), dtype=jnp.uint32)


def _mixed(bits: Any, place: Any, number: Callable[[int], Any]) -> Any:
    """Murmur3's last steps over each element: one to one for every place, so that one change is always seen."""
    bits = bits ^ (place * number(0x9E3779B1))
    bits = (bits ^ (bits >> number(16))) * number(0x85EBCA6B)
    bits = (bits ^ (bits >> number(13))) * number(0xC2B2AE35)
    return bits ^ (bits >> number(16))
