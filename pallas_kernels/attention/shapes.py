"""The shapes that HART's attention has, by name, for tests, tuning and benchmarks."""

import dataclasses
import itertools

from pallas_kernels.attention.mask import Segments


@dataclasses.dataclass(frozen=True)
class Shape:
    """Queries in segments with the end of their keys; how many keys there are."""

    segments: Segments
    keys: int

    @property
    def queries(self) -> int:
        return sum(size for size, _ in self.segments)

    @property
    def pairs(self) -> int:
        """Of query and key that see each other: the useful work."""
        return sum(size * end for size, end in self.segments)


CONTEXT = 300
# Tokens of scales 1, 2, ... of squares of so many pixels a side, and of 832x1248 and 1360x768 pixels.
SCALES = {
    "256": (4, 9, 16, 25, 36, 64, 100, 169, 256),
    "512": (4, 9, 16, 36, 81, 169, 324, 576, 1024),
    "1024": (4, 9, 16, 25, 49, 81, 144, 256, 441, 729, 1296, 2304, 4096),
    "1024 2:3": (4, 9, 16, 24, 48, 84, 140, 260, 442, 726, 1305, 2301, 4056),
    "1024 16:9": (4, 9, 15, 24, 50, 84, 144, 252, 448, 735, 1296, 2304, 4080),
}


def training(size: str, kept: float = 1.0) -> Shape:
    """All scales at once, with a share of the last one's tokens."""
    *early, last = SCALES[size]
    sizes = (CONTEXT, *early, int(last * kept))
    return Shape(tuple(zip(sizes, itertools.accumulate(sizes), strict=True)), sum(sizes))


def decoding(size: str) -> Shape:
    """The last scale against all that came before and itself."""
    keys = CONTEXT + sum(SCALES[size])
    return Shape(((SCALES[size][-1], keys),), keys)


# Token subsampling keeps half of the last scale's tokens at most.
SHAPES = {
    "256": training("256"),
    "256 half": training("256", 0.5),
    "512": training("512"),
    "512 half": training("512", 0.5),
    "1024": training("1024"),
    "1024 half": training("1024", 0.5),
    "1024 2:3": training("1024 2:3"),
    "1024 16:9": training("1024 16:9"),
    "1024 decode": decoding("1024"),
}
