"""An experiment: everything that one file in `configs/` says, as frozen settings."""
# ruff: noqa: RUF009 - settings are frozen, so a shared default is safe

import dataclasses
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ml_collections import ConfigDict

from hart_jax.config.buckets import bucket_shapes
from hart_jax.config.model import TokenizerConfig, TransformerConfig, check_fit, check_list
from hart_jax.config.scale_lists import list_of
from hart_jax.config.scales import Scale, as_list
from hart_jax.config.settings import LATER, Settings
from hart_jax.config.training import (
    ATTENTION,
    DTYPES,
    DataConfig,
    HartLossConfig,
    MeshConfig,
    OptimizerConfig,
    TokenizerLossConfig,
    TrainConfig,
)
from hart_jax.errors import UserError
from hart_jax.io.paths import check_path

# Below this the discriminator's last layer has no patch left.
MIN_DISCRIMINATOR_PX = 24
WEIGHTS = ("float", "int8")
TOKENIZER_MODULES = ("encoder", "quant_conv", "quantizer", "post_quant_conv", "decoder")


@dataclasses.dataclass(frozen=True)
class TokenizerExperiment(Settings):
    """Trains the hybrid tokenizer.

    It starts from the tokenizer in `init_from` (a workdir, a model folder, a release; empty: from scratch), of which
    the modules `freeze` stay as they are: with encoder, quant_conv and quantizer, only decoding is trained.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    init_from: str = ""
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_path(self.init_from, "init_from")
        unknown = sorted(set(self.freeze) - set(TOKENIZER_MODULES))
        if unknown or set(self.freeze) == set(TOKENIZER_MODULES):
            raise UserError(f"freeze={self.freeze}: give some of {', '.join(TOKENIZER_MODULES)}, not all")
        if self.freeze and not self.init_from:
            raise UserError(f"freeze={self.freeze}: needs init_from, a trained tokenizer to start from")
        if "quantizer" in self.freeze and self.loss.restart_below > 0:
            raise UserError("loss.restart_below: a frozen quantizer's codes do not restart; set it to 0")
        shapes = self.tokenizer.image_shape, *bucket_shapes(self.data.buckets, self.tokenizer)
        size, loss = min(map(min, shapes)), self.loss
        if loss.adversarial > 0 and size < MIN_DISCRIMINATOR_PX:
            raise UserError(
                f"image_size={size}: the discriminator needs {MIN_DISCRIMINATOR_PX} px or more; set loss.adversarial=0"
            )
        if loss.perceptual > 0 and size < 2 ** (loss.perceptual_layers - 1):
            raise UserError(
                f"loss.perceptual_layers={loss.perceptual_layers}: too many for image_size={size}, each halves it"
            )


# The sampler computes with float32: from here on a number may not be finite there, and below 2 / this it may be 0.
FLOAT32_END = 2.0**127
# Of `SampleConfig`: how it is computed.
_COMPUTED = ("attention", "weights", "dtype", "decode_at_once")


@dataclasses.dataclass(frozen=True)
class SampleConfig(Settings):
    """How images are sampled (SPEC.md section 3). `top_k` 0 keeps all; `masked_iterations` are the last scale's;
    `attention` and `dtype` are how it is computed (see `TrainConfig`); `weights` "int8" quantizes the transformer's
    matrices.

    `decode_at_once` images of each device are decoded at a time, which changes memory, not images; 0: as many as
    have 2**20 pixels. `scales` is the list of scales that is sampled, or the number of them, which names a list that
    the model was trained on (`hart_jax.config.scale_lists`); empty: the model's `patch_nums`. `late_scale` and what
    else counts scales counts those of `patch_nums`, of which each scale of another list stands for the nearest.

    The defaults are the release's. What a loaded model is best sampled with is its `sample_config`.
    """

    cfg: float = 4.5
    top_k: int = 600
    top_k_late: int = 300
    late_scale: int = 7
    top_p: float = 1.0
    temperature: float = 1.0
    smooth: bool = False
    discrete_only: bool = False
    masked_iterations: int = 1
    attention: str = "auto"
    weights: str = "float"
    dtype: str = "auto"
    decode_at_once: int = 0
    scales: int | tuple[Scale, ...] = dataclasses.field(default=(), metadata=LATER)

    @classmethod
    def default(cls, vocab_size: int) -> Self:
        """The release's; a codebook of fewer codes than its top-k keeps all of them."""
        return cls(top_k=min(cls.top_k, vocab_size), top_k_late=min(cls.top_k_late, vocab_size))

    def image_settings(self) -> dict[str, Any]:
        """Those that say which image is sampled, not how it is computed."""
        return {name: value for name, value in self.to_dict().items() if name not in _COMPUTED}

    def of_model(self, config: TransformerConfig, untrained: bool = False) -> Self:
        """These settings with `scales` as a list of that model: empty where it is `patch_nums`.

        Raises:
          UserError: see `list_of`, which knows what `untrained` is.
        """
        scales = list_of(self.scales, config, untrained)
        return dataclasses.replace(self, scales=() if scales == config.patch_nums else scales)

    def __post_init__(self) -> None:
        self.require_types()
        if self.scales and not isinstance(self.scales, int):
            object.__setattr__(self, "scales", as_list(self.scales, "scales"))
            check_list(self.scales, "scales")
        checks = {
            f"top_k={self.top_k}: must be 0 (all) or more": self.top_k >= 0,
            f"top_k_late={self.top_k_late}: must be 0 (all) or more": self.top_k_late >= 0,
            f"late_scale={self.late_scale}: must be 0 or more": self.late_scale >= 0,
            f"top_p={self.top_p}: must be in (0, 1]": 0 < self.top_p <= 1,
            f"temperature={self.temperature}: must be above 0 and finite, as float32": (
                2 / FLOAT32_END <= self.temperature < FLOAT32_END
            ),
            f"cfg={self.cfg}: must be 0 or more and finite, as float32": 0 <= self.cfg < FLOAT32_END,
            f"masked_iterations={self.masked_iterations}: must be 1 or more": self.masked_iterations >= 1,
            f"attention={self.attention!r}: must be one of {', '.join(ATTENTION)}": self.attention in ATTENTION,
            f"weights={self.weights!r}: must be one of {', '.join(WEIGHTS)}": self.weights in WEIGHTS,
            f"dtype={self.dtype!r}: must be one of {', '.join(DTYPES)}": self.dtype in DTYPES,
            f"decode_at_once={self.decode_at_once}: must be 0 (by size) or more": self.decode_at_once >= 0,
        }
        for message, ok in checks.items():
            if not ok:
                raise UserError(message)

    def check_fits(self, config: TokenizerConfig | TransformerConfig) -> None:
        """Raises `UserError` if top-k keeps more codes than there are, or there are more iterations than positions."""
        vocab_size, positions = config.vocab_size, config.sizes[-1]
        if self.masked_iterations > positions:
            raise UserError(
                f"masked_iterations={self.masked_iterations}: the last scale has {positions} positions; "
                "give at most that"
            )
        for name in ("top_k", "top_k_late"):
            if getattr(self, name) > vocab_size:
                raise UserError(f"{name}={getattr(self, name)}: the codebook has {vocab_size} codes; give at most that")


@dataclasses.dataclass(frozen=True)
class HartExperiment(Settings):
    """Trains the transformer with its diffusion head on a frozen tokenizer and text encoder, and samples from it.

    `tokenizer_from` is a tokenizer workdir or a model folder's `tokenizer/`; `text_encoder` a text encoder's folder;
    `system_prompt` the file of what it reads before every prompt (`hart_jax.text.system_prompt`; empty: the one in its
    folder, or none);
    `init_from` the workdir or model folder of the curriculum's stage before, whose transformer a new run starts with;
    `precompute_text` and `precompute_tokens` keep text embeddings and image tokens on disk, computed once;
    `sample_prompts` are what sample grids show (empty: some captions of the training data);
    `model` the folder that `sample.py` samples from if no checkpoint is given.
    """

    tokenizer: TokenizerConfig = TokenizerConfig()
    transformer: TransformerConfig = TransformerConfig()
    loss: HartLossConfig = HartLossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    tokenizer_from: str = ""
    init_from: str = ""
    text_encoder: str = ""
    system_prompt: str = ""
    precompute_text: bool = True
    precompute_tokens: bool = False
    sample_prompts: tuple[str, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("tokenizer_from", "init_from", "text_encoder", "system_prompt", "model"):
            check_path(getattr(self, name), name)
        check_fit(self.tokenizer, self.transformer)
        bucket_shapes(self.data.buckets, self.tokenizer)
        self.sample.check_fits(self.tokenizer)
        self.sample.of_model(self.transformer, untrained=True)
        if self.precompute_tokens and self.data.flip:
            raise UserError("precompute_tokens=True keeps tokens of images as they are: set data.flip=False")
        if self.loss.condition_top_k > self.tokenizer.vocab_size:
            message = (
                f"loss.condition_top_k={self.loss.condition_top_k}: the codebook has {self.tokenizer.vocab_size} codes"
            )
            raise UserError(message)

    def sampled(self) -> Self:
        """With the settings of both networks at the list that `sample.scales` names, trained or not."""
        scales = list_of(self.sample.scales, self.transformer, untrained=True)
        tokenizer, transformer = self.tokenizer.of_list(scales), self.transformer.of_list(scales)
        sample = dataclasses.replace(self.sample, scales=())
        return dataclasses.replace(self, tokenizer=tokenizer, transformer=transformer, sample=sample)


Experiment = TokenizerExperiment | HartExperiment
CONFIG_FILE_HELP = "a config file defines get_config() returning an ml_collections.ConfigDict"


def experiment_from(values: Mapping[str, Any]) -> Experiment:
    """The experiment of a config's values; one with a `transformer` trains HART, one without its tokenizer."""
    kind = HartExperiment if "transformer" in values else TokenizerExperiment
    return kind.from_dict(values)


def stage_of(argument: str, count: int) -> int:
    """Which of a config's stages, 1 to `count`, `file.py:stage=N` asks for: `argument` is what follows the colon."""
    found = re.fullmatch(r"stage=([0-9]{1,9})", argument)
    if not found or not 1 <= int(found[1]) <= count:
        known = ", ".join(f"stage={stage}" for stage in range(1, count + 1))
        raise UserError(f"there is no {argument!r}; the stages are {known}")
    return int(found[1])


def split_config(value: str | Path) -> tuple[str, tuple[str, ...]]:
    """The file of `file.py:stage=2`, and what its `get_config` is called with."""
    path, colon, argument = str(value).partition(".py:")
    return (f"{path}.py", (argument,)) if colon else (path, ())


def read_experiment(config: str | Path) -> Experiment:
    """The experiment of a file in `configs/`, or of one of its stages (`file.py:stage=2`), without overrides.

    Raises:
      UserError: as `read_config` says, or a value is wrong.
    """
    return experiment_from(read_config(config).to_dict())


def read_config(config: str | Path) -> ConfigDict:
    """What the file, or a stage of it, gives, unchecked.

    Raises:
      UserError: no such file or stage, or it raises something or has no `get_config`.
    """
    path, arguments = split_config(config)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; see configs/")
    try:
        get_config = runpy.run_path(path).get("get_config")
        values = get_config(*arguments) if callable(get_config) else None
    except Exception as error:
        raise UserError(raised_in(path, error) or f"{path}: raises {_described(error)}") from error
    if not isinstance(values, ConfigDict):
        raise UserError(f"{path}: {CONFIG_FILE_HELP}")
    return values


def raised_in(path: str | Path, error: BaseException) -> str | None:
    """What a config file raised, and on which of its lines; None where it was not the file that did."""
    if isinstance(error, TypeError) and str(error).startswith("get_config() takes 0 positional arguments"):
        return f"{path}: has no stages; give the file alone"
    # On a command line the text of another error holds this one.
    if "TypeError: get_config() missing 1 required positional argument" in _described(error):
        return f"{path}: needs a stage; give {path}:stage=1"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _same_file(frame, path)]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).absolute() == Path(path).absolute():
        lines.append(error.lineno or 0)
    if lines and isinstance(error, UserError):
        return f"{path}: {error}"
    return f"{path}: line {lines[-1]} raises {_described(error)}" if lines else None


def _same_file(frame: FrameType, path: str | Path) -> bool:
    return Path(frame.f_code.co_filename).absolute() == Path(path).absolute()


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
