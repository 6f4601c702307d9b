"""Training the hybrid tokenizer on images, as a task of the loop."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.data.batches import Batches
from hart_jax.data.pipeline import make_loader
from hart_jax.errors import UserError
from hart_jax.experiment import TokenizerExperiment
from hart_jax.images import from_uint8, grid, to_uint8
from hart_jax.parallel.mesh import Placement, local_rows, on_host, on_mesh, to_global
from hart_jax.parallel.rules import parameter_axes
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import load_lpips
from hart_jax.training.flops import StepFlops
from hart_jax.training.loop import Batch
from hart_jax.training.state import compute_dtype, make_optimizer
from hart_jax.training.tokenizer_step import (
    TokenizerState,
    init_tokenizer_state,
    make_tokenizer_step,
    tokenizer_flops,
    tokenizer_state,
)
from hart_jax.training.workdir import load_tokenizer, previous_stage

SHOWN = 12
FIRST = 64


class TokenizerTask:
    """See `hart_jax.training.loop.Task`."""

    def __init__(self, experiment: TokenizerExperiment, placement: Placement):
        self._config, self._placement = experiment, placement
        train = experiment.train
        self._tokenizer = Tokenizer(experiment.tokenizer, compute_dtype(train.dtype))
        self._optimizer = make_optimizer(experiment.optimizer, train.steps)
        self._key = jax.random.key(train.seed)
        loss = experiment.loss
        if loss.perceptual > 0 and not loss.perceptual_weights:
            raise UserError("loss.perceptual_weights is empty: give the LPIPS weights, or set loss.perceptual=0")
        lpips = load_lpips(loss.perceptual_weights) if loss.perceptual > 0 else None
        self._lpips = on_mesh(lpips, placement.whole)
        self._shown = next(self._loader((experiment.data.test,), SHOWN, train=False))["image"]
        # The codebook starts from the latents of these; enough of them for distinct codes.
        batches = self._loader(experiment.data.train_folders, train.batch_size, train=True)
        self._first = np.concatenate([b["image"] for b in itertools.islice(batches, -(-FIRST // train.batch_size))])
        self._reconstruct = jax.jit(self._both_reconstructions, static_argnums=2, out_shardings=placement.whole)
        # Traced once, for its shapes and for running it.
        self.init = jax.jit(self._fresh)
        image = jax.ShapeDtypeStruct((1, *self._first.shape[1:]), jnp.float32)
        self._adversarial = loss.adversarial > 0
        axes = dict(parameter_axes(jax.eval_shape(self._tokenizer.init, self._key, image)["params"]))
        if self._adversarial:
            axes = {**parameter_axes(jax.eval_shape(Discriminator().init, self._key, image)["params"]), **axes}
        self.places = placement.state(jax.eval_shape(self.init), axes)
        self._flops: dict[bool, StepFlops] = {}
        ema_decay = experiment.optimizer.ema_decay
        self._step = make_tokenizer_step(
            self._tokenizer, self._optimizer, loss, ema_decay, (self.places, placement.whole), train.accumulate
        )

    def _loader(
        self, shards: tuple[str, ...], batch_size: int, *, train: bool, rows: Sequence[int] | None = None
    ) -> Batches:
        return make_loader(
            shards,
            weights=self._config.data.weights if train else (),
            image_size=self._config.tokenizer.image_size,
            batch_size=batch_size,
            seed=self._config.train.seed,
            train=train,
            flip=train and self._config.data.flip,
            rows=rows,
            cache=rows is not None and self._config.data.cache,
            workers=self._config.data.workers if train else 0,
            max_bad_records=self._config.data.max_bad_records,
        )

    def batches(self) -> Batches:
        size = self._config.train.batch_size
        rows = local_rows(self._placement.batch, size)
        return self._loader(self._config.data.train_folders, size, train=True, rows=rows)

    def _fresh(self) -> TokenizerState:
        images, key = from_uint8(jnp.asarray(self._first)), jax.random.fold_in(self._key, 0)
        freeze, adversarial = self._config.freeze, self._adversarial
        return init_tokenizer_state(key, self._tokenizer, self._optimizer, images, freeze, adversarial)

    def load_previous(self) -> None:
        if self._config.init_from:
            self._previous = previous_stage(load_tokenizer, self._config.init_from, self._config.tokenizer)

    def start(self) -> TokenizerState:
        if not self._config.init_from:
            return jax.jit(self.init, out_shardings=self.places)()

        def continued(params: Any) -> TokenizerState:
            key, size = jax.random.fold_in(self._key, 0), self._config.tokenizer.image_size
            return tokenizer_state(key, params, self._optimizer, size, self._config.freeze, self._adversarial)

        return jax.jit(continued, out_shardings=self.places)(on_mesh(self._previous, self._placement.whole))

    def step(self, state: TokenizerState, batch: Batch, step: int) -> tuple[TokenizerState, dict[str, jax.Array]]:
        adversarial = self._adversarial and step > self._config.loss.adversarial_start
        image = to_global(self._placement.batch, batch["image"], self._config.train.batch_size)
        arguments = state, image, jax.random.fold_in(self._key, 1), self._lpips, adversarial
        with self._placement.tracing():
            if adversarial not in self._flops:
                self._flops[adversarial] = tokenizer_flops(self._step.trace(*arguments), self._tokenizer, state, image)
            state, metrics = self._step(*arguments)
        return state, {**metrics, **self._flops[adversarial].metrics()}

    def _both_reconstructions(self, params, images: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Discrete and hybrid, of the first `count` images."""
        image = from_uint8(images)
        discrete, hybrid = (
            self._tokenizer.apply({"params": params}, image, continuous=continuous, method="reconstruct")
            for continuous in (False, True)
        )
        return discrete[:count], hybrid[:count]

    def pictures(self, state: TokenizerState) -> dict[str, np.ndarray]:
        """Rows of original, discrete and hybrid reconstruction of the first test images."""
        with self._placement.tracing():
            images = self._placement.filled(self._shown)
            discrete, hybrid = on_host(self._reconstruct(state.ema, images, len(self._shown)))
        rows = np.concatenate([self._shown, to_uint8(discrete), to_uint8(hybrid)])
        return {"reconstructions": grid(rows, columns=len(self._shown))}
