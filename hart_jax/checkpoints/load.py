"""A model from anywhere: a training workdir, a model folder, or a folder in the released layout."""

from pathlib import Path

from hart_jax.checkpoints.convert.cache import read_released_cached
from hart_jax.checkpoints.convert.released import is_released, read_released
from hart_jax.checkpoints.model_folder import Model, read_model
from hart_jax.config import HartExperiment
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.paths import as_path


def load_model(path: str | Path, cache: bool = True) -> Model:
    """The model in a training workdir, a model folder, or a folder in the released layout.

    The converted weights of the latter are kept for the next time if `cache`: see `hart_jax.checkpoints.convert.cache`.

    Raises:
      UserError: the path holds none of them, or a damaged one.
    """
    path = as_path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a training workdir, a model folder or the released layout")
    if (path / "checkpoints").is_dir():
        # Here, because Orbax takes seconds to import and only workdirs need it.
        from hart_jax.checkpoints.workdir import read_workdir

        return read_workdir(path)
    path = local_copy(path)
    if is_released(path):
        return read_released_cached(path) if cache else read_released(path)
    return read_model(path)


def check_model(model: Model, experiment: HartExperiment, source: str | Path) -> None:
    """Raises `UserError` if the model is not the one that the experiment describes, naming what differs."""
    experiment.tokenizer.check_same(model.tokenizer_config, source, "tokenizer")
    experiment.transformer.check_same(model.transformer_config, source, "transformer")
