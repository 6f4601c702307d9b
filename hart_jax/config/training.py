"""Settings of a training: losses, optimizer, mesh, data, steps."""

import dataclasses
import math

from hart_jax.config.settings import LATER, Settings, require
from hart_jax.io.paths import check_path

# What is computed in: see `hart_jax.nn.dtypes.compute_dtype`.
DTYPES = ("auto", "float32", "bfloat16")
# How attention is computed: `pallas_kernels.attention.IMPLEMENTATIONS`.
ATTENTION = ("auto", "reference", "xla", "tpu", "gpu", "splash", "cudnn", "tokamax")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """AdamW with warm-up and decay; weight decay on matrices only.

    `muon_learning_rate` above 0 trains the matrices of the transformer's blocks with Muon at that peak instead
    (arXiv 2502.16982: updates of Adam's size, so that both rates compare), everything else with AdamW as before.
    """

    learning_rate: float = 1e-4
    muon_learning_rate: float = 0.0
    warmup_steps: int = 1000
    schedule: str = "cosine"
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    clip_norm: float = 2.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        known = ("cosine", "linear", "constant")
        require(self.schedule in known, f"schedule={self.schedule!r}: must be one of {', '.join(known)}")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}: must be above 0")
        require(self.clip_norm > 0, f"clip_norm={self.clip_norm}: must be above 0")
        for name in ("muon_learning_rate", "warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be 0 or more")
        for name in ("b1", "b2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)}: must be in [0, 1)")
        require(0 <= self.final_fraction <= 1, f"final_fraction={self.final_fraction}: must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Sizes of the mesh's axes, one of them possibly -1 (the remaining devices); `rules` change
    `hart_jax.parallel.rules.RULES`, as "mlp=fsdp".

    `slices` are the groups of devices with slow links between them, which `data` alone crosses: TPU slices, or hosts
    of GPUs. 0: as many as there are TPU slices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "tensor")}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size}: must be 1 or more, or -1 for the remaining devices")
        require(list(sizes.values()).count(-1) <= 1, f"mesh={sizes}: only one size can be -1")
        require(self.slices >= 0, f"mesh.slices={self.slices}: must be 1 or more, or 0 for those that TPUs say")


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Folders of ArrayRecord shards (`hart_jax.data.shards`); `cache` keeps the resized images in memory.

    Training images come from `train`, or from several folders, `sources`: in proportion to `weights`, by size without.
    Of them, `max_bad_records` may turn out not to decode: others take their places. Shards in a bucket are
    copied to this machine as they are read, up to `stage_gib` of them at a time.

    `buckets` are ratios, width to height, as ("1:1", "2:3", "3:2"): each image goes to the nearest, and a batch has
    images of one, of the model's number of pixels. Empty: all have the model's size.
    """

    train: str = ""
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    test: str = ""
    flip: bool = True
    cache: bool = False
    workers: int = 0
    max_bad_records: int = 100
    stage_gib: float = 64.0
    buckets: tuple[str, ...] = dataclasses.field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        for name, folders in (("train", (self.train,)), ("sources", self.sources), ("test", (self.test,))):
            for folder in folders:
                check_path(folder, f"data.{name}")
        for name in ("workers", "max_bad_records"):
            require(getattr(self, name) >= 0, f"data.{name}={getattr(self, name)}: must be 0 or more")
        require(0 < self.stage_gib <= 2**30, f"data.stage_gib={self.stage_gib}: must be above 0, and 2**30 at most")
        both = f"data.sources={self.sources} and data.train={self.train!r}: give one of them, set the other to empty"
        require(not (self.sources and self.train), both)
        weights = f"data.weights={self.weights}: needs one above 0 for each of the {len(self.sources)} data.sources"
        require(not self.weights or len(self.weights) == len(self.sources), weights)
        require(all(weight > 0 for weight in self.weights), weights)

    @property
    def train_folders(self) -> tuple[str, ...]:
        """The folders of training images; empty where none is set."""
        return self.sources or ((self.train,) if self.train else ())


@dataclasses.dataclass(frozen=True)
class TokenizerLossConfig(Settings):
    """Weights and first steps of the tokenizer's losses (unknown in the paper: VQGAN practice)."""

    mse: float = 1.0
    l1: float = 0.0
    vq: float = 1.0
    perceptual: float = 0.5
    perceptual_layers: int = 5
    perceptual_weights: str = ""
    adversarial: float = 0.1
    adversarial_start: int = 10_000
    continuous_fraction: float = 0.5
    restart_below: float = 0.0

    def __post_init__(self) -> None:
        check_path(self.perceptual_weights, "loss.perceptual_weights")
        fraction = self.continuous_fraction
        require(0 <= fraction <= 1, f"loss.continuous_fraction={fraction}: a probability")
        require(1 <= self.perceptual_layers <= 5, f"loss.perceptual_layers={self.perceptual_layers}: must be in 1..5")
        for name in ("mse", "l1", "vq", "perceptual", "adversarial", "adversarial_start"):
            require(getattr(self, name) >= 0, f"loss.{name}={getattr(self, name)}: must be 0 or more")
        below = self.restart_below
        require(0 <= below < 1, f"loss.restart_below={below}: a share of batches, in [0, 1)")


@dataclasses.dataclass(frozen=True)
class HartLossConfig(Settings):
    """The transformer's losses and the draws of its training (SPEC.md section 5).

    `mistakes` is not the paper's: each sample's scales build on codes that are wrong by up to that much of their size,
    and learn to correct it, as sampling needs (after the self-correction of Infinity, arXiv 2412.04431).

    In every step a share of the last scale's tokens is dropped, drawn from the normal of `drop_mean` and `drop_std`
    between `drop_min` and 1; `drop_std=0` drops `drop_mean` always. Both 0: all tokens are trained on, always.
    """

    token: float = 1.0
    diffusion: float = 1.0
    condition_top_k: int = 600
    condition_top_p: float = 0.96
    drop_text: float = 0.1
    drop_mean: float = 1.0
    drop_std: float = 0.25
    drop_min: float = 0.5
    min_kept: int = 32
    keep_counts: int = 4
    mistakes: float = 0.0

    def __post_init__(self) -> None:
        for name in ("token", "diffusion", "mistakes"):
            require(getattr(self, name) >= 0, f"loss.{name}={getattr(self, name)}: must be 0 or more")
        require(0 <= self.drop_text <= 1, f"loss.drop_text={self.drop_text}: a probability")
        require(0 <= self.drop_min <= 1, f"loss.drop_min={self.drop_min}: a fraction of the last scale")
        require(0 < self.condition_top_p <= 1, f"loss.condition_top_p={self.condition_top_p}: must be in (0, 1]")
        for name in ("condition_top_k", "min_kept", "keep_counts"):
            require(getattr(self, name) >= 1, f"loss.{name}={getattr(self, name)}: must be 1 or more")
        mean, deviation = self.drop_mean, self.drop_std
        require(0 <= mean <= 1, f"loss.drop_mean={mean}: a fraction of the last scale")
        require(deviation >= 0, f"loss.drop_std={deviation}: must be 0 or more")
        if not mean and not deviation:
            return
        # So rare a draw would be tried for a thousand times, or for ever.
        likely = self.dropped_below(1.0) - self.dropped_below(self.drop_min) > 1e-3
        require(
            likely if deviation else mean >= self.drop_min,
            f"loss.drop_mean={mean} and drop_std={deviation} as good as never drop a share in {self.drop_min}..1, as "
            "loss.drop_min asks; set drop_mean and drop_std to 0 for no token subsampling, or lower drop_min",
        )

    def dropped_below(self, share: float) -> float:
        """The probability that the normal, without its ends cut, drops less; its deviation is not 0."""
        return 0.5 * (1 + math.erf((share - self.drop_mean) / (self.drop_std * math.sqrt(2)))) if self.drop_std else 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """Length, logging, checkpoints and precision of a training run.

    `dtype` "auto": bfloat16 on TPU and GPU, float32 on CPU. `remat` trades memory for time in the transformer's blocks:
    "none", "dots" (keeps the results of products with weights) or "full" (keeps the blocks' inputs alone).
    `attention` is how it is computed, "auto" as the device does best (`pallas_kernels.attention`).
    `unroll` compiles the transformer's blocks one by one, which on a CPU trains faster and takes longer to compile.
    `accumulate` splits every batch of `batch_size` into so many parts that are computed one after the other.

    The latest `keep_checkpoints` stay on disk, and besides them those of multiples of `keep_every` (0: none) and the
    one with the lowest logged value of the metric `keep_best` (empty: none). Images are sampled every `sample_every`
    steps and at the end; 0: never. A step whose loss or gradients are not finite changes nothing; after `max_skipped`
    of them in a row training stops. `profile_steps` (first, last) are traced into the workdir's `profile`.
    `log_records` writes which images every step took into records.jsonl.
    """

    steps: int = 100_000
    batch_size: int = 256
    accumulate: int = 1
    seed: int = 0
    dtype: str = "auto"
    remat: str = "none"
    attention: str = "auto"
    unroll: bool = False
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 5000
    keep_checkpoints: int = 2
    keep_every: int = 0
    keep_best: str = ""
    max_skipped: int = 10
    profile_steps: tuple[int, ...] = ()
    log_records: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "log_every", "save_every", "keep_checkpoints", "max_skipped")
        for name in counts:
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: must be 1 or more")
        require(self.sample_every >= 0, f"train.sample_every={self.sample_every}: must be 0 (no images) or more")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.accumulate={self.accumulate}: must divide train.batch_size={self.batch_size}",
        )
        require(self.dtype in DTYPES, f"train.dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}")
        require(self.remat in ("none", "dots", "full"), f"train.remat={self.remat!r}: none, dots or full")
        known = ", ".join(ATTENTION)
        require(self.attention in ATTENTION, f"train.attention={self.attention!r}: must be one of {known}")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}: must be in 0..2**32-1")
        require(
            self.keep_every >= 0 and self.keep_every % self.save_every == 0,
            f"train.keep_every={self.keep_every}: must be 0 or a multiple of save_every={self.save_every}",
        )
        require(
            not self.keep_best or self.save_every % self.log_every == 0,
            f"train.save_every={self.save_every}: must be a multiple of log_every={self.log_every}, "
            "as train.keep_best chooses by the value logged at a checkpoint",
        )
        profiled = self.profile_steps
        require(
            not profiled or (len(profiled) == 2 and 1 <= profiled[0] <= profiled[1]),
            f"train.profile_steps={profiled}: must be (first, last) with 1 <= first <= last, or empty",
        )
