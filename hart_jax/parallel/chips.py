"""What one chip of each kind can do, from the makers' data sheets."""

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """`memory` in bytes; bfloat16 `flops`, and bytes, a second: `bandwidth` of the memory, `link` of all links to other
    chips together, in one direction, and `network`, its share of the data-centre network: to other slices of TPUs, or
    other hosts of GPUs."""

    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float


CHIPS = {
    "v4": Chip(32 * GiB, 275e12, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip(16 * GiB, 197e12, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip(95 * GiB, 459e12, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip(32 * GiB, 918e12, 1.64e12, 448e9, 12.5e9),
    # Of one of a chip's two devices.
    "tpu7x": Chip(96 * GiB, 1153.5e12, 3.69e12, 300e9, 6.25e9),
    "h100": Chip(80 * GiB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip(141 * 10**9, 989e12, 4.8e12, 450e9, 50e9),
}
