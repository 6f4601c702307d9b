"""Training the hybrid tokenizer on images, as a task of the loop."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from hart_jax.checkpoints.workdir import load_tokenizer, previous_stage
from hart_jax.config import TokenizerExperiment
from hart_jax.data.batches import Batches
from hart_jax.data.pipeline import make_loader
from hart_jax.errors import UserError
from hart_jax.io.images import grid, to_uint8
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.mesh import MeshLayout, gather_to_host, local_rows, make_global_batch, put_global
from hart_jax.tokenizer.perceptual import load_lpips
from hart_jax.training.loop import Batch
from hart_jax.training.tokenizer_functions import tokenizer_functions
from hart_jax.training.tokenizer_step import TokenizerState

SHOWN = 12
FIRST = 64


class TokenizerTask:
    """See `hart_jax.training.loop.Task`."""

    def __init__(self, experiment: TokenizerExperiment, layout: MeshLayout):
        self._config, self._layout = experiment, layout
        train = experiment.train
        self._key = jax.random.key(train.seed)
        loss = experiment.loss
        if loss.perceptual > 0 and not loss.perceptual_weights:
            raise UserError("loss.perceptual_weights is empty: give the LPIPS weights, or set loss.perceptual=0")
        lpips = load_lpips(loss.perceptual_weights) if loss.perceptual > 0 else None
        self._lpips = put_global(lpips, layout.replicated)
        self._shown = next(self._loader((experiment.data.test,), SHOWN, train=False))["image"]
        # The codebook starts from the latents of these; enough of them for distinct codes.
        batches = self._loader(experiment.data.train_folders, train.batch_size, train=True)
        found = [batch["image"] for batch in itertools.islice(batches, -(-FIRST // train.batch_size))]
        self._first = np.concatenate(found)[:FIRST]
        self._adversarial = loss.adversarial > 0
        self._functions = tokenizer_functions(experiment, layout)
        self.shardings = self._functions.shardings
        self._flops: dict[bool, StepFlops] = {}

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
        rows = local_rows(self._layout.batch, size)
        return self._loader(self._config.data.train_folders, size, train=True, rows=rows)

    def abstract_state(self) -> TokenizerState:
        return self._functions.abstract_state

    def load_pretrained(self) -> None:
        if self._config.init_from:
            self._previous = previous_stage(load_tokenizer, self._config.init_from, self._config.tokenizer)

    def init_state(self) -> TokenizerState:
        if not self._config.init_from:
            return self._functions.init(self._layout.put_padded(self._first), len(self._first))
        return self._functions.from_params(put_global(self._previous, self._layout.replicated))

    def step(self, state: TokenizerState, batch: Batch, step: int) -> tuple[TokenizerState, dict[str, jax.Array]]:
        adversarial = self._adversarial and step > self._config.loss.adversarial_start
        image = make_global_batch(self._layout.batch, batch["image"], self._config.train.batch_size)
        arguments = state, image, jax.random.fold_in(self._key, 1), self._lpips, adversarial
        with self._layout.activate():
            if adversarial not in self._flops:
                self._flops[adversarial] = self._functions.flops(arguments)
            state, metrics = self._functions.step(*arguments)
        return state, {**metrics, **self._flops[adversarial].metrics()}

    def sample_grids(self, state: TokenizerState) -> dict[str, np.ndarray]:
        """Rows of original, discrete and hybrid reconstruction of the first test images."""
        images = self._layout.put_padded(self._shown)
        discrete, hybrid = gather_to_host(self._functions.reconstruct(state.ema, images, len(self._shown)))
        rows = np.concatenate([self._shown, to_uint8(discrete), to_uint8(hybrid)])
        return {"reconstructions": grid(rows, columns=len(self._shown))}
