"""Pictures from prompts with a model from anywhere: what `sample.py` and a notebook call.

model = load_model("assets/emoji")
images = Painter(model, SampleConfig(cfg=3.0))(["a flat icon of a dog"], seed=0)
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.conditions import conditions_of
from hart_jax.convert.released import is_released, read_released
from hart_jax.errors import UserError
from hart_jax.experiment import HartExperiment, SampleConfig
from hart_jax.generate import make_layered_sampler, make_sampler, split_layers
from hart_jax.images import to_uint8
from hart_jax.model_folder import Model, read_model
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.state import compute_dtype
from hart_jax.transformer.model import Hart

# A CPU draws layer by layer from larger models, whose weights do not stay in its caches anyway.
LAYERED_BYTES = 2**28


def use_compilation_cache() -> None:
    """Keeps compiled functions on disk, so that the next process starts quickly.

    In $JAX_COMPILATION_CACHE_DIR where that is set, else in hart_jax under the user's cache folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "hart_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def load_model(path: str | Path) -> Model:
    """The model in a training workdir, a model folder, or a folder in the released layout.

    Raises:
      UserError: the path holds none of them, or a damaged one.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a training workdir, a model folder or the released layout")
    # Here, because Orbax takes seconds to import and only workdirs need it.
    if (path / "checkpoints").is_dir():
        from hart_jax.training.workdir import read_workdir

        return read_workdir(path)
    if is_released(path):
        return read_released(path)
    return read_model(path)


def check_model(model: Model, experiment: HartExperiment, source: str | Path) -> None:
    """Raises `UserError` if the model is not the one that the experiment describes, naming what differs."""
    experiment.tokenizer.check_same(model.tokenizer_config, source, "tokenizer")
    experiment.transformer.check_same(model.transformer_config, source, "transformer")


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@dataclasses.dataclass(frozen=True)
class Picture:
    """One sample: `image` uint8 (H, W, 3), number `index` of its wish (a prompt, or the label of a class)."""

    wish: str | int
    index: int
    image: np.ndarray


class Painter:
    """Draws pictures; compiled once per batch size. `text_encoder` replaces the folder that the model names."""

    def __init__(self, model: Model, settings: SampleConfig, text_encoder: str | Path | None = None):
        config, dtype = model.transformer_config, compute_dtype("auto")
        self._conditions = conditions_of(config, text_encoder or model.text_encoder)
        layered = jax.default_backend() == "cpu" and _bytes(model.transformer["layers"]) > LAYERED_BYTES
        make = make_layered_sampler if layered else make_sampler
        params = {"transformer": model.transformer, "tokenizer": model.tokenizer}
        self._sample = make(Hart(config, dtype), Tokenizer(model.tokenizer_config, dtype), settings)
        self._params = jax.device_put(split_layers(params) if layered else params)

    def draw(
        self, wishes: Sequence[str | int], num_images: int, seed: int, batch_size: int = 8
    ) -> Iterator[list[Picture]]:
        """Batches of pictures, `num_images` of each wish: prompts, or labels for a class-conditional model.

        A picture depends on (wish, seed, its index) alone.

        Raises:
          UserError: no wish, an empty prompt, or a label that the model does not have.
        """
        self._conditions.check(wishes)
        jobs = [(wish, index) for wish in wishes for index in range(num_images)]
        size = min(batch_size, len(jobs))
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            # The last batch is filled up, so that one compilation serves all.
            full = part + part[:1] * (size - len(part))
            condition = self._conditions([wish for wish, _ in full])
            images, _ = self._sample(self._params, condition, seed, jnp.array([index for _, index in full]))
            pictures = zip(part, to_uint8(jax.device_get(images)), strict=False)
            yield [Picture(wish, index, image) for (wish, index), image in pictures]

    def __call__(self, wishes: Sequence[str | int], seed: int = 0, num_images: int = 1) -> np.ndarray:
        """All pictures at once, uint8 (N, H, W, 3), wish by wish."""
        return np.stack([picture.image for batch in self.draw(wishes, num_images, seed) for picture in batch])
