"""Aspect buckets: images of about the same ratio train together, at the size of their bucket.

Which bucket a step has is drawn from the seed. Each bucket has epochs of its own, in which each of its images comes
once.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from hart_jax.config.scales import Scale, Shape, shape_of
from hart_jax.errors import UserError

# Steps whose buckets are drawn at a time; another number is another order.
_BLOCK = 4096
# Tells these draws from others with the same seed.
_STREAM = 7


def nearest_shape(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """Which of some shapes has the ratio nearest to that of each size, by its logarithm; of equally near the first.

    An image loses least when it is cropped to that shape. Sizes (n, 2) are heights and widths; of one that is not known
    (0), the ratio is taken for 1:1.
    """
    known = np.where(np.min(sizes, axis=1, keepdims=True) > 0, sizes, 1).astype(np.float64)
    elongated = np.log(known[:, 0] / known[:, 1])
    of_shapes = np.log([height / width for height, width in shapes])
    # Rounded, so that a square lies as far from 2:3 as from 3:2.
    return np.round(np.abs(elongated[:, None] - of_shapes), 9).argmin(axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class AspectBuckets:
    """The buckets of the records of shards: what each is called, its height and width in pixels, and the bucket of each
    record, (n,) int32."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    of_record: np.ndarray

    @classmethod
    def nearest(cls, names: Sequence[str], shapes: Sequence[Shape], sizes: np.ndarray) -> "AspectBuckets":
        """Every record in the bucket whose shape is nearest to its size: see `nearest_shape`."""
        return cls(tuple(names), tuple(shapes), nearest_shape(sizes, shapes))

    @classmethod
    def of_one_size(cls, size: Scale, count: int) -> "AspectBuckets":
        """All of `count` records in one."""
        return cls(("all",), (shape_of(size),), np.zeros(count, np.int32))

    @functools.cached_property
    def records(self) -> tuple[np.ndarray, ...]:
        """The numbers of the records of each bucket, ascending."""
        return tuple(np.flatnonzero(self.of_record == bucket) for bucket in range(len(self.names)))

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Of each record the place among those of its bucket, (n,)."""
        places = np.zeros(len(self.of_record), np.int64)
        for numbers in self.records:
            places[numbers] = np.arange(len(numbers))
        return places

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.records))

    def check_full(self, batch_size: int) -> None:
        """Raises `UserError`, naming it, for a bucket that has fewer images than a batch."""
        for name, (height, width), count in zip(self.names, self.shapes, self.counts, strict=True):
            if count < batch_size:
                raise UserError(
                    f"data.buckets: {name} ({width}x{height}) has {count} of the {len(self.of_record)} images, fewer "
                    f"than the batch of {batch_size}; leave this bucket out, or give a smaller train.batch_size"
                )

    def shares(self, folder_starts: Sequence[int], weights: Sequence[float] = ()) -> np.ndarray:
        """How much of the batches each bucket (row) gives to each folder (column) of the shards, as they relate.

        A folder has its weight, without weights as many as it has images, whatever buckets these are in.
        """
        folders = len(folder_starts) - 1
        of_folder = np.repeat(np.arange(folders), np.diff(folder_starts))
        counts = np.zeros((len(self.names), folders))
        np.add.at(counts, (self.of_record, of_folder), 1)
        return np.asarray(weights) * (counts / counts.sum(axis=0)) if weights else counts


@dataclasses.dataclass(frozen=True)
class BucketOrder:
    """Which bucket each step takes its batch of: drawn from the seed, in proportion to these, whatever process asks."""

    seed: int
    shares: tuple[float, ...]

    def __call__(self, step: int) -> tuple[int, int]:
        """The bucket of a step, numbered from 0, and how many steps before had it."""
        block, place = divmod(step, _BLOCK)
        buckets, before = _of_block(self.seed, self.shares, block)
        return int(buckets[place]), int(before[place])


@functools.lru_cache(maxsize=8)
def _of_block(seed: int, shares: tuple[float, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    buckets, kinds = _drawn(seed, shares, block), range(len(shares))
    before = np.zeros(_BLOCK, np.int64)
    earlier = _count_before(seed, shares, block)
    for bucket in kinds:
        there = np.flatnonzero(buckets == bucket)
        before[there] = earlier[bucket] + np.arange(len(there))
    return buckets, before


def _drawn(seed: int, shares: tuple[float, ...], block: int) -> np.ndarray:
    ends = np.cumsum(shares)
    draws = np.random.default_rng((seed, block, _STREAM)).random(_BLOCK) * ends[-1]
    return np.minimum(np.searchsorted(ends, draws, side="right"), len(ends) - 1)


def _count_before(seed: int, shares: tuple[float, ...], block: int) -> np.ndarray:
    """How many steps of all earlier blocks had each bucket: some ten microseconds a block."""
    counts = np.zeros(len(shares), np.int64)
    for earlier in range(block):
        counts += np.bincount(_drawn(seed, shares, earlier), minlength=len(counts))
    return counts
