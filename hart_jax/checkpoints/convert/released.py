"""The released layout in our settings and parameters.

    tokenizer/  config.json  model.safetensors
    llm/        config.json  model.safetensors and/or ema_model.bin

Where a `model.safetensors` is expected, one in several files with its `model.safetensors.index.json`, or a
`pytorch_model.bin`, serves as well. An EMA file holds a plain state dict with the names of the model's own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hart_jax.checkpoints.convert.tokenizer import discriminator_variables, tokenizer_config, tokenizer_params
from hart_jax.checkpoints.convert.transformer import transformer_config, transformer_params
from hart_jax.checkpoints.model_folder import Model, abstract_tokenizer, abstract_transformer
from hart_jax.config import TokenizerConfig, TransformerConfig, check_fit
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json
from hart_jax.io.safetensors import check_tree
from hart_jax.io.state_dict import StateDict
from hart_jax.io.tensor_files import Weights, open_tensors, weight_file

TOKENIZER, TRANSFORMER = "tokenizer", "llm"


def is_released(folder: str | Path) -> bool:
    """Whether `folder` has the released layout, rather than that of our model folders."""
    return (local_copy(folder) / TRANSFORMER / "config.json").is_file()


def read_released(source: str | Path, weights: Weights = "ema") -> Model:
    """The model in the folder `source`, parameters in float32; every tensor is accounted for, every shape checked.

    Args:
      source: the folder with `tokenizer/` and `llm/`.
      weights: "ema" takes the transformer's EMA where the release has one, "model" never.

    Raises:
      UserError: a file, setting or tensor is missing, damaged, of another shape, or one that HART has no place for.
    """
    source = local_copy(source)
    for part in (TOKENIZER, TRANSFORMER):
        if not (source / part).is_dir():
            raise UserError(f"{source / part}: no such folder; a release has tokenizer/ and llm/ side by side")
    tokenizer_settings, transformer_settings = read_configs(source)
    tokenizer = _convert_tokenizer(_open(weight_file(source / TOKENIZER, "model")), tokenizer_settings)
    transformer = _convert(
        _open(weight_file(source / TRANSFORMER, weights)),
        lambda state: transformer_params(state, transformer_settings),
        lambda: abstract_transformer(transformer_settings),
    )
    return Model(tokenizer_settings, tokenizer, transformer_settings, transformer, text_encoder=None)


def is_released_tokenizer(source: str | Path) -> bool:
    """Whether `source` is a file, as VAR's tokenizer is, or a folder whose tokenizer has a released config.json."""
    config = _tokenizer_folder(local_copy(source)) / "config.json"
    return local_copy(source).is_file() or (config.is_file() and "ch_mult" in read_json(config))


def read_released_tokenizer(source: str | Path, expected: TokenizerConfig) -> tuple[TokenizerConfig, Any]:
    """The tokenizer of a release, parameters in float32, every tensor accounted for; without its discriminator.

    Args:
      source: a released HART, its `tokenizer/`, or VAR's tokenizer file, whose names lack the first part.
      expected: says the scales, and for a file, which has no settings of its own, all the rest.

    Raises:
      UserError: a file, setting or tensor is missing, damaged, of another shape, or has no place in a tokenizer.
    """
    source = local_copy(source)
    if source.is_file():
        tensors = {f"vae.{name}": tensor for name, tensor in open_tensors(source).items()}
        return expected, _convert_tokenizer(StateDict(tensors, str(source)), expected)
    part = _tokenizer_folder(source)
    try:
        config = tokenizer_config(_ReleasedConfig(part / "config.json"), expected.patch_nums)
    except (TypeError, ValueError) as error:
        raise UserError(f"{part / 'config.json'}: {error}") from None
    return config, _convert_tokenizer(_open(weight_file(part, "model")), config)


def _tokenizer_folder(source: Path) -> Path:
    return source / TOKENIZER if (source / TOKENIZER).is_dir() else source


def _convert_tokenizer(state: StateDict, config: TokenizerConfig) -> Any:
    return _convert(
        state,
        lambda state: (tokenizer_params(state, config), discriminator_variables(state))[0],
        lambda: abstract_tokenizer(config),
    )


def read_released_discriminator(source: str | Path) -> dict[str, Any] | None:
    """Variables of `Discriminator` in a release's tokenizer, or None if it has none; sampling does not need them."""
    file = weight_file(local_copy(source) / TOKENIZER, "model")
    return _explained(_open(file), discriminator_variables)


class _ReleasedConfig(dict[str, Any]):
    """A config.json in which a missing setting is the user's error."""

    def __init__(self, path: Path):
        super().__init__(read_json(path))
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self._path}: no setting {name!r}; this is not the config of a released HART")


def read_configs(source: Path) -> tuple[TokenizerConfig, TransformerConfig]:
    """Settings of both parts; `UserError` where a config.json is missing or says what we do not know."""
    tokenizer = _ReleasedConfig(source / TOKENIZER / "config.json")
    llm = _ReleasedConfig(source / TRANSFORMER / "config.json")
    try:
        ours = transformer_config(llm, tokenizer)
        # One tokenizer serves several sizes: how many scales there are is the transformer's to say.
        theirs = tokenizer_config(tokenizer, ours.patch_nums)
        check_fit(theirs, ours)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: a setting in a config.json has a value of the wrong type ({error})") from error
    return theirs, ours


def _open(file: Path) -> StateDict:
    return StateDict(open_tensors(file), str(file))


def _convert(state: StateDict, params: Callable[[StateDict], Any], expected: Callable[[], Any]) -> Any:
    converted = _explained(state, params)
    state.finish()
    check_tree(converted, expected(), state.source)
    return converted


def _explained(state: StateDict, params: Callable[[StateDict], Any]) -> Any:
    """`params(state)`, where a shape that cannot even be brought into ours is the user's error."""
    try:
        return params(state)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{state.source}: tensor {state.latest!r} does not fit config.json ({error})") from error
