"""A model from anywhere: a training workdir, a model folder, or a folder in the released layout."""

from pathlib import Path

from hart_jax.checkpoints.convert.cache import read_released_cached
from hart_jax.checkpoints.convert.released import is_released, read_configs, read_released
from hart_jax.checkpoints.model_folder import CONFIG, Model, read_model, read_sampling
from hart_jax.config import (
    HartExperiment,
    HartLossConfig,
    SampleConfig,
    TokenizerConfig,
    TransformerConfig,
)
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.paths import as_path, is_remote


def load_model(path: str | Path, cache: bool = True) -> Model:
    """The model in a training workdir, a model folder, or a folder in the released layout.

    The converted weights of the latter are kept for the next time if `cache`: see `hart_jax.checkpoints.convert.cache`.

    Raises:
      UserError: the path holds none of them, or a damaged one.
    """
    path = _model_path(path)
    if _is_workdir(path):
        from hart_jax.checkpoints.workdir import read_workdir

        return read_workdir(path)
    path = local_copy(path)
    if is_released(path):
        return read_released_cached(path) if cache else read_released(path)
    return read_model(path)


def read_experiment_of(path: str | Path) -> HartExperiment:
    """What a model is and how it is sampled from, without its weights; the path as `load_model` takes it.

    Raises:
      UserError: the path holds no model, a damaged one, or a tokenizer alone.
    """
    path = _model_path(path)
    if _is_workdir(path):
        from hart_jax.checkpoints.workdir import read_hart_experiment

        return read_hart_experiment(path)
    folder, sampling = local_copy(path), None
    if is_released(folder):
        tokenizer, transformer = read_configs(folder)
    else:
        tokenizer = TokenizerConfig.read(folder / "tokenizer" / CONFIG)
        transformer = TransformerConfig.read(folder / "transformer" / CONFIG)
        sampling = read_sampling(folder, tokenizer)
    sample = sampling or SampleConfig.default(tokenizer.vocab_size)
    # A loss is part of an experiment; a small codebook has fewer codes than its default asks for.
    loss = HartLossConfig(condition_top_k=min(HartLossConfig.condition_top_k, tokenizer.vocab_size))
    return HartExperiment(tokenizer, transformer, loss, sample=sample)


def _model_path(path: str | Path) -> Path:
    path = as_path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder{'' if is_remote(path) or path.is_absolute() else f' in {Path.cwd()}'}; "
            "give a training workdir, a model folder or the released layout"
        )
    if path.name in ("tokenizer", "transformer") and (path / CONFIG).is_file():
        raise UserError(f"{path}: a part of a model; give the folder of the whole, {path.parent}")
    return path


def _is_workdir(path: Path) -> bool:
    # Not by `hart_jax.checkpoints.workdir`, which is imported only for one: Orbax takes seconds to import.
    return (path / "checkpoints").is_dir()


def check_model(model: Model, experiment: HartExperiment, source: str | Path) -> None:
    """Raises `UserError` if the model is not the one that the experiment describes, naming what differs."""
    experiment.tokenizer.check_same(model.tokenizer_config, source, "tokenizer")
    experiment.transformer.check_same(model.transformer_config, source, "transformer")
