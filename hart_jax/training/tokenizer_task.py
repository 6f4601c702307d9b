"""Training the hybrid tokenizer on images, as a task of the loop."""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.data.pipeline import make_loader
from hart_jax.errors import UserError
from hart_jax.experiment import TokenizerExperiment
from hart_jax.images import from_uint8, grid, to_uint8
from hart_jax.parallel.mesh import data_mesh, replicated
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import load_lpips
from hart_jax.training.loop import Batch
from hart_jax.training.state import compute_dtype, make_optimizer
from hart_jax.training.tokenizer_step import TokenizerState, init_tokenizer_state, make_tokenizer_step

SHOWN = 12
FIRST = 64


class TokenizerTask:
    """See `hart_jax.training.loop.Task`."""

    def __init__(self, experiment: TokenizerExperiment):
        self._config = experiment
        train = experiment.train
        self._tokenizer = Tokenizer(experiment.tokenizer, compute_dtype(train.dtype))
        self._optimizer = make_optimizer(experiment.optimizer, train.steps)
        self._key = jax.random.key(train.seed)
        ema_decay = experiment.optimizer.ema_decay
        self._step = make_tokenizer_step(self._tokenizer, self._optimizer, experiment.loss, ema_decay)
        loss = experiment.loss
        if loss.perceptual > 0 and not loss.perceptual_weights:
            raise UserError("loss.perceptual_weights is empty: give the LPIPS weights, or set loss.perceptual=0")
        mesh = data_mesh(train.batch_size)
        lpips = load_lpips(loss.perceptual_weights) if loss.perceptual > 0 else None
        self._lpips = jax.device_put(lpips, replicated(mesh))
        self._shown = next(self._loader(experiment.data.test, SHOWN, train=False))["image"]
        # The codebook starts from the latents of these; enough of them for distinct codes.
        batches = self._loader(experiment.data.train, train.batch_size, train=True)
        self._first = np.concatenate([b["image"] for b in itertools.islice(batches, -(-FIRST // train.batch_size))])
        self._reconstruct = jax.jit(self._both_reconstructions)

    def _loader(self, shards: str, batch_size: int, train: bool, cache: bool = False) -> Iterator[Batch]:
        return make_loader(
            shards,
            image_size=self._config.tokenizer.image_size,
            batch_size=batch_size,
            seed=self._config.train.seed,
            train=train,
            flip=train and self._config.data.flip,
            cache=cache,
            workers=self._config.data.workers if train else 0,
        )

    def batches(self) -> Iterator[Batch]:
        config = self._config
        return self._loader(config.data.train, config.train.batch_size, train=True, cache=config.data.cache)

    def init(self) -> TokenizerState:
        images = from_uint8(jnp.asarray(self._first))
        return init_tokenizer_state(jax.random.fold_in(self._key, 0), self._tokenizer, self._optimizer, images)

    def step(self, state: TokenizerState, batch: Batch, step: int) -> tuple[TokenizerState, dict[str, jax.Array]]:
        adversarial = self._config.loss.adversarial > 0 and step > self._config.loss.adversarial_start
        return self._step(state, batch["image"], jax.random.fold_in(self._key, 1), self._lpips, adversarial)

    def _both_reconstructions(self, params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        image = from_uint8(images)
        discrete, hybrid = (
            self._tokenizer.apply({"params": params}, image, continuous=continuous, method="reconstruct")
            for continuous in (False, True)
        )
        return discrete, hybrid

    def pictures(self, state: TokenizerState) -> dict[str, np.ndarray]:
        """Rows of original, discrete and hybrid reconstruction of the first test images."""
        discrete, hybrid = jax.device_get(self._reconstruct(state.model.ema, self._shown))
        rows = np.concatenate([self._shown, to_uint8(discrete), to_uint8(hybrid)])
        return {"reconstructions": grid(rows, columns=len(self._shown))}
