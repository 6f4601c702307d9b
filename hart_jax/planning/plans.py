"""What a job needs of a pod, as a plan says it."""

import dataclasses

from hart_jax.config.scales import Scale, area_of

# Images a second that a core decodes and resizes for batches of this size, from JPEG files of 1024 px:
# `python benchmarks/loader.py --only_ours --cores`, 2026-11-28. Another size takes the nearest larger one's.
DECODED_BY_CORE = {256: 235.0, 512: 133.0, 1024: 94.0}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step (or sampling one batch) needs. Bytes are of one chip, FLOPs of all chips together.

    `flops` are those that the program asks for, rematerialisation and frozen networks included, `model_flops` those of
    the model (see `hart_jax.nn.flop_counter.StepFlops`); `device_flops` are those of one chip as compiled.
    `hbm_bytes` are bytes read from and written to the chip's memory, `collective_bytes` those put on its links by kind
    of collective, `slow_collective_bytes` those of them that leave its slice or host; of the rest of
    `collective_bytes`, and of these, the compiler lets `overlapped` and `overlapped_slowly` go on beside other work. A
    program that the compiler refuses has no `device_flops`, `hbm_bytes` and `collective_bytes`, and `peak` is 0 where
    it does not say by how much it is too big.

    `text_encoder` are the weights of the one that is kept beside it, which `peak` counts. For captions encoded on the
    fly, `text_states` are the next step's states, `text_temporaries` what encoding them needs, `text_flops` its FLOPs,
    and `text_seconds` its roofline; `arguments`, `temporaries`, `flops`, `device_flops`, `hbm_bytes`,
    `collective_bytes` and the other seconds are the step's, or the sampler's, alone.

    `image_size` is in pixels, as settings write it. A training compiles at most so many `programs` of its step: of each
    of its `buckets` (one without `data.buckets`) and `lists` of scales one for each number of last-scale tokens that it
    keeps. Planned is the largest.
    """

    topology: str
    what: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    memory: int
    arguments: int
    temporaries: int
    peak: int
    fits: bool
    flops: float
    device_flops: float | None
    hbm_bytes: float | None
    collective_bytes: dict[str, float] | None
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    compile_seconds: float
    slow_link_seconds: float = 0.0
    slow_collective_bytes: float = 0.0
    overlapped: float = 0.0
    overlapped_slowly: float = 0.0
    model_flops: float = 0.0
    text_encoder: int = 0
    text_states: int = 0
    text_temporaries: int = 0
    text_flops: float = 0.0
    text_compute_seconds: float = 0.0
    text_seconds: float = 0.0
    hosts: int = 1
    image_size: Scale = 0
    buckets: int = 0
    lists: int = 0
    programs: int = 0

    @property
    def step_seconds(self) -> float:
        """The roofline: the longest part, as if all of them overlapped perfectly, and then the captions' encoding."""
        parts = self.compute_seconds, self.memory_seconds, self.link_seconds, self.slow_link_seconds
        return max(parts) + self.text_seconds

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation, if a step took that long."""
        return (self.compute_seconds + self.text_compute_seconds) / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, if a step took that long."""
        return self.hfu * self.model_flops / (self.flops + self.text_flops)

    @property
    def host_images(self) -> float:
        """Images a second that every host must give its chips, if a step took that long."""
        return self.batch_size / self.hosts / self.step_seconds

    @property
    def host_bytes(self) -> float:
        """Bytes a second of their pixels (uint8)."""
        return self.host_images * area_of(self.image_size) * 3

    @property
    def host_cores(self) -> float:
        """Cores of every host that decode as many from JPEG files of 1024 px."""
        pixels = area_of(self.image_size)
        rate = DECODED_BY_CORE[min((side for side in DECODED_BY_CORE if area_of(side) >= pixels), default=1024)]
        return self.host_images / rate
