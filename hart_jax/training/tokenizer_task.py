"""Training the hybrid tokenizer on images, as a task of the loop."""

import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from hart_jax.checkpoints.workdir import load_tokenizer, previous_stage
from hart_jax.config import Scale, Shape, TokenizerExperiment
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.batches import Batches
from hart_jax.data.pipeline import make_loader
from hart_jax.errors import UserError
from hart_jax.io.images import grid, to_uint8
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.mesh import MeshLayout, gather_to_host, local_rows, make_global_batch, put_global
from hart_jax.tokenizer.perceptual import load_lpips
from hart_jax.training.buckets import find_buckets, grid_name, shapes_of
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
        # Of each bucket, of the model's own shape without any.
        self._shapes = shapes_of(experiment.data, experiment.tokenizer)
        # The same images at every shape.
        self._shown = {bucket: self._first_test_images(shape) for bucket, shape in self._shapes.items()}
        # The codebook starts from the latents of these, of the model's own shape; enough of them for distinct codes.
        batches = self._loader(experiment.data.train_folders, train.batch_size, train=True)
        found = [batch["image"] for batch in itertools.islice(batches, -(-FIRST // train.batch_size))]
        self._first = np.concatenate(found)[:FIRST]
        self._adversarial = loss.adversarial > 0
        self._functions = tokenizer_functions(experiment, layout)
        self._of_buckets = [self._functions.at(shape) for shape in self._shapes.values()]
        self.shardings = self._functions.shardings
        self._flops: dict[tuple[Shape, bool], StepFlops] = {}

    @functools.cached_property
    def buckets(self) -> AspectBuckets | None:
        return find_buckets(self._config.data, self._config.tokenizer, self._config.train.batch_size)

    @property
    def programs(self) -> int:
        return len(self._of_buckets) * len({self._is_adversarial(step) for step in (1, self._config.train.steps)})

    @property
    def grids(self) -> int:
        return len(self._of_buckets)

    def _first_test_images(self, size: Scale) -> np.ndarray:
        return next(self._loader((self._config.data.test,), SHOWN, train=False, image_size=size))["image"]

    def _loader(
        self,
        shards: tuple[str, ...],
        batch_size: int,
        *,
        train: bool,
        image_size: Scale | None = None,
        buckets: AspectBuckets | None = None,
        rows: Sequence[int] | None = None,
    ) -> Batches:
        return make_loader(
            shards,
            weights=self._config.data.weights if train else (),
            image_size=image_size or self._config.tokenizer.image_size,
            buckets=buckets,
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
        return self._loader(self._config.data.train_folders, size, train=True, buckets=self.buckets, rows=rows)

    def abstract_state(self) -> TokenizerState:
        return self._functions.abstract_state

    def load_pretrained(self) -> None:
        if self._config.init_from:
            self._previous = previous_stage(load_tokenizer, self._config.init_from, self._config.tokenizer)

    def init_state(self) -> TokenizerState:
        if not self._config.init_from:
            return self._functions.init(self._layout.put_padded(self._first), len(self._first))
        return self._functions.from_params(put_global(self._previous, self._layout.replicated))

    def _is_adversarial(self, step: int) -> bool:
        return self._adversarial and step > self._config.loss.adversarial_start

    def step(self, state: TokenizerState, batch: Batch, step: int) -> tuple[TokenizerState, dict[str, jax.Array]]:
        functions, adversarial = self._of_buckets[int(batch.get("bucket", 0))], self._is_adversarial(step)
        program = functions.tokenizer.config.image_shape, adversarial
        image = make_global_batch(self._layout.batch, batch["image"], self._config.train.batch_size)
        arguments = state, image, jax.random.fold_in(self._key, 1), self._lpips, adversarial
        with self._layout.activate():
            if program not in self._flops:
                self._flops[program] = functions.flops(arguments)
            state, metrics = functions.step(*arguments)
        return state, {**metrics, **self._flops[program].metrics()}

    def sample_grids(self, state: TokenizerState) -> dict[str, np.ndarray]:
        """Rows of original, discrete and hybrid reconstruction of the first test images, at each shape."""
        grids = {}
        for (bucket, shown), functions in zip(self._shown.items(), self._of_buckets, strict=True):
            images = self._layout.put_padded(shown)
            discrete, hybrid = gather_to_host(functions.reconstruct(state.ema, images, len(shown)))
            rows = np.concatenate([shown, to_uint8(discrete), to_uint8(hybrid)])
            grids[grid_name("reconstructions", bucket)] = grid(rows, columns=len(shown))
        return grids
