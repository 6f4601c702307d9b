"""Models out of training workdirs."""

from pathlib import Path
from typing import Any

from hart_jax.checkpoint import CHECKPOINT_DIR, load_config, load_params
from hart_jax.config import TokenizerConfig
from hart_jax.errors import UserError
from hart_jax.experiment import HartExperiment, TokenizerExperiment, experiment_from
from hart_jax.model_folder import Model, abstract_tokenizer, abstract_transformer, read_tokenizer
from hart_jax.weights import check_tree


def is_workdir(path: str | Path) -> bool:
    return (Path(path) / CHECKPOINT_DIR).is_dir()


def load_tokenizer(source: str | Path, expected: TokenizerConfig) -> Any:
    """The (averaged) parameters of the tokenizer in a workdir, a model folder, or its `tokenizer/`.

    Raises:
      UserError: there is none, or its settings are not `expected`.
    """
    path = Path(source)
    if is_workdir(path):
        experiment = experiment_from(load_config(path))
        if not isinstance(experiment, TokenizerExperiment):
            raise UserError(f"{path}: this workdir trains a transformer, not a tokenizer")
        config, params = experiment.tokenizer, load_params(path, "model.ema")
        check_tree(params, abstract_tokenizer(config), f"tokenizer checkpoint in {path}")
    else:
        folder = path / "tokenizer" if (path / "tokenizer").is_dir() else path
        config, params = read_tokenizer(folder)
    if config != expected:
        ours, theirs = expected.to_dict(), config.to_dict()
        differing = [f"{name}={theirs[name]!r}, not {ours[name]!r}" for name in ours if ours[name] != theirs[name]]
        raise UserError(f"{path}: a tokenizer of another config: {'; '.join(differing)}")
    return params


def read_workdir(path: str | Path, which: str = "ema") -> Model:
    """The model of a transformer's workdir: its latest averaged parameters with the tokenizer and text encoder it uses.

    Raises:
      UserError: no checkpoint, or one of another kind of run.
    """
    experiment = experiment_from(load_config(path))
    if not isinstance(experiment, HartExperiment):
        raise UserError(f"{path}: this workdir trains a tokenizer; give the workdir of a transformer")
    params = load_params(path, which)
    check_tree(params, abstract_transformer(experiment.transformer), f"transformer checkpoint in {path}")
    tokenizer = load_tokenizer(experiment.tokenizer_from, experiment.tokenizer)
    text_encoder = Path(experiment.text_encoder)
    return Model(
        experiment.tokenizer,
        tokenizer,
        experiment.transformer,
        params,
        text_encoder if text_encoder.is_dir() else None,
    )
