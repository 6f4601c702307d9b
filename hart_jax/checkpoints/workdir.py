"""Models out of training workdirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hart_jax.checkpoints.class_names import class_names, read_classes
from hart_jax.checkpoints.convert.released import is_released_tokenizer, read_released_tokenizer
from hart_jax.checkpoints.model_folder import (
    Model,
    abstract_tokenizer,
    abstract_transformer,
    read_tokenizer,
    read_transformer,
)
from hart_jax.checkpoints.orbax import CHECKPOINT_DIR, load_config, load_params
from hart_jax.config import (
    HartExperiment,
    Settings,
    TokenizerConfig,
    TokenizerExperiment,
    TransformerConfig,
    experiment_from,
)
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.paths import as_path
from hart_jax.io.safetensors import check_tree


def is_workdir(path: str | Path) -> bool:
    return (as_path(path) / CHECKPOINT_DIR).is_dir()


def _workdir_or_copy(source: str | Path) -> Path:
    """A workdir where it is; a model in a bucket as its local copy."""
    return as_path(source) if is_workdir(source) else local_copy(source)


def load_tokenizer(source: str | Path, expected: TokenizerConfig) -> Any:
    """The (averaged) parameters of the tokenizer in a workdir, a model folder, its `tokenizer/`, or a release.

    A release is a released HART, its `tokenizer/`, or VAR's tokenizer file. The tokenizer may be of another image size:
    one serves all, so `image_size`, `patch_nums` and `levels` may differ.

    Raises:
      UserError: there is none, or its settings are not `expected`.
    """
    path = _workdir_or_copy(source)
    if not is_workdir(path) and is_released_tokenizer(path):
        config, params = read_released_tokenizer(path, expected)
    else:
        config, params = find_tokenizer(path)
    same_size = config.with_scales(expected.patch_nums, expected.levels)
    expected.check_same(same_size, path, "tokenizer")
    check_tree(params, abstract_tokenizer(expected), f"tokenizer in {path}")
    return params


def find_tokenizer(source: str | Path) -> tuple[TokenizerConfig, Any]:
    """Settings and (averaged) parameters of the tokenizer in a workdir, a model folder, or its `tokenizer/`.

    Raises:
      UserError: there is none.
    """
    path = _workdir_or_copy(source)
    if is_workdir(path):
        experiment = experiment_from(load_config(path))
        if not isinstance(experiment, TokenizerExperiment):
            raise UserError(f"{path}: this workdir trains a transformer, not a tokenizer")
        config, params = experiment.tokenizer, load_params(path, "model.ema")
        if experiment.freeze:
            params |= load_params(path, "frozen")
        check_tree(params, abstract_tokenizer(config), f"tokenizer checkpoint in {path}")
        return config, params
    return read_tokenizer(path / "tokenizer" if (path / "tokenizer").is_dir() else path)


def load_transformer(source: str | Path, expected: TransformerConfig) -> Any:
    """The (averaged) parameters of the transformer in a workdir, a model folder, or its `transformer/`.

    It may have been trained at another resolution: relative positions carry over, so `patch_nums`, `levels` and
    `scale_lists` may differ.

    Raises:
      UserError: there is none, its settings are not `expected`, or it has learned something of each scale
        (`use_timestep_embed=False`) and the scales differ in number.
    """
    path = _workdir_or_copy(source)
    if is_workdir(path):
        experiment = experiment_from(load_config(path))
        if not isinstance(experiment, HartExperiment):
            raise UserError(f"{path}: this workdir trains a tokenizer, not a transformer")
        config, params = experiment.transformer, load_params(path, "ema")
    else:
        config, params = read_transformer(path / "transformer" if (path / "transformer").is_dir() else path)
    expected.check_same(config.with_scales(expected.patch_nums, expected.levels), path, "transformer")
    check_tree(params, abstract_transformer(expected), f"transformer in {path}")
    return params


def read_hart_experiment(path: str | Path) -> HartExperiment:
    """What a transformer's workdir was started with; `UserError` for one of another kind of run."""
    experiment = experiment_from(load_config(path))
    if not isinstance(experiment, HartExperiment):
        raise UserError(f"{path}: this workdir trains a tokenizer; give the workdir of a transformer")
    return experiment


def read_workdir(path: str | Path, which: str = "ema") -> Model:
    """The model of a transformer's workdir: its latest averaged parameters with the tokenizer and text encoder it uses.

    Raises:
      UserError: no checkpoint, or one of another kind of run.
    """
    experiment = read_hart_experiment(path)
    params = load_params(path, which)
    check_tree(params, abstract_transformer(experiment.transformer), f"transformer checkpoint in {path}")
    tokenizer = load_tokenizer(experiment.tokenizer_from, experiment.tokenizer)
    text_encoder = experiment.text_encoder and local_copy(experiment.text_encoder, "text_encoder")
    return Model(
        experiment.tokenizer,
        tokenizer,
        experiment.transformer,
        params,
        text_encoder if text_encoder and text_encoder.is_dir() else None,
        local_copy(experiment.system_prompt, "system_prompt") if experiment.system_prompt else None,
        _classes(as_path(path), experiment),
        experiment.sample,
    )


def _classes(workdir: Path, experiment: HartExperiment) -> tuple[str, ...]:
    """Names of the classes that a run was trained on, none for one that is trained on text."""
    if not experiment.transformer.num_classes:
        return ()
    return read_classes(workdir) or class_names(experiment.data.train_folders)


def previous_stage(load: Callable[[str, Any], Any], init_from: str, expected: Settings) -> Any:
    """What `load` reads from `init_from`; `UserError` names the setting too."""
    try:
        return load(init_from, expected)
    except UserError as error:
        raise UserError(f"init_from={init_from}: cannot start from it: {error}") from None
