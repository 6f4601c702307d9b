"""Training the transformer on images and captions, with a frozen tokenizer and text encoder, as a task of the loop."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.checkpoints.class_names import CLASSES, class_names, read_classes, write_classes
from hart_jax.checkpoints.workdir import load_tokenizer, load_transformer, previous_stage
from hart_jax.config import HartExperiment, HartLossConfig, Shape
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.batches import Batches
from hart_jax.data.pipeline import PlacedText, TextFunction, TokenFunction, load_captions, make_loader, some_captions
from hart_jax.data.precomputed import (
    TEXTS,
    TOKENS,
    PrecomputedTexts,
    PrecomputedTokens,
    describe_texts,
    describe_tokens,
    is_precomputed,
)
from hart_jax.data.text_cache import CaptionTokens, cache_texts
from hart_jax.data.token_cache import cache_tokens
from hart_jax.errors import UserError
from hart_jax.io.images import grid, to_uint8
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.mesh import (
    MeshLayout,
    first_process_first,
    gather_to_host,
    local_rows,
    make_global_batch,
    put_global,
)
from hart_jax.text.conditioning import TextConditioner, conditioner_of
from hart_jax.text.encoder import TextEncoder, text_options
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens
from hart_jax.training.buckets import find_buckets, grid_name, shapes_of
from hart_jax.training.hart_functions import hart_functions
from hart_jax.training.list_draws import draw_list
from hart_jax.training.loop import Batch
from hart_jax.training.state import TrainState
from hart_jax.training.token_subsampling import draw_num_kept, kept_counts

# Classes in a sample grid, or captions of the data.
SHOWN = 8


class HartTask:
    """See `hart_jax.training.loop.Task`.

    Precomputed text embeddings and tokens come from the records or are kept in `cache_folder`. `ideas` are `mask`,
    `objective`, `token_loss` and `rules` of `hart_functions`, where they are not HART's.
    """

    def __init__(self, experiment: HartExperiment, cache_folder: Path, layout: MeshLayout, **ideas: Any):
        train, config = experiment.train, experiment.transformer
        self._classes = config.num_classes
        for prompt in experiment.sample_prompts:
            if not prompt.strip():
                raise UserError(
                    f"sample_prompts={experiment.sample_prompts}: an entry is empty; give words, or leave it out"
                )
        self._config, self._cache_folder, self._layout = experiment, cache_folder, layout
        self._functions = hart_functions(experiment, layout, **ideas)
        # Of each bucket, of the model's own shape without any, those of each list of scales.
        self._shapes = shapes_of(experiment.data, experiment.tokenizer)
        self._of_buckets = [
            [self._functions.at(shape, scales) for scales in config.lists] for shape in self._shapes.values()
        ]
        self.shardings = self._functions.shardings
        self._tokenizer_host = load_tokenizer(experiment.tokenizer_from, experiment.tokenizer)
        self._tokenizer_params = put_global(self._tokenizer_host, layout.replicated)
        self._conditioner = conditioner_of(config, experiment.text_encoder, experiment.system_prompt, layout)
        self._encoder = self._conditioner.encoder if isinstance(self._conditioner, TextConditioner) else None
        self._key = jax.random.key(train.seed)
        self._flops: dict[tuple[tuple[Shape, ...], int], StepFlops] = {}
        self._last_loss: jax.Array | None = None

    @functools.cached_property
    def buckets(self) -> AspectBuckets | None:
        return find_buckets(self._config.data, self._config.tokenizer, self._config.train.batch_size)

    @property
    def programs(self) -> int:
        found = itertools.chain.from_iterable(self._of_buckets)
        return sum(len(kept_counts(each.hart.config.sizes[-1], self._config.loss)) for each in found)

    @property
    def grids(self) -> int:
        return sum(map(len, self._of_buckets))

    def batches(self) -> Batches:
        data = self._config.data
        # Looked for before either is computed, so that nothing is written where records hold those of other models.
        stored = self._stored_text(), self._stored_tokens()
        if self._classes:
            first_process_first(self._check_classes)
        batches = make_loader(
            data.train_folders,
            weights=data.weights,
            image_size=self._config.tokenizer.image_size,
            buckets=self.buckets,
            batch_size=self._config.train.batch_size,
            rows=local_rows(self._layout.batch, self._config.train.batch_size),
            seed=self._config.train.seed,
            text=self._text_function(self._encoder, stored[0]) if self._encoder else None,
            tokens=self._token_function(stored[1]) if self._config.precompute_tokens else None,
            flip=data.flip,
            cache=data.cache,
            workers=data.workers,
            max_bad_records=data.max_bad_records,
        )
        if self._encoder and not self._config.precompute_text:
            batches.prepare = functools.partial(self._with_states, self._encoder)
        return batches

    def _check_classes(self) -> None:
        """Keeps the names of the classes in the workdir.

        Raises:
          UserError: there are more than the model has, or the run that goes on had others.
        """
        folders, workdir = self._config.data.train_folders, self._cache_folder
        names, before = class_names(folders), read_classes(workdir)
        if len(names) > self._classes:
            raise UserError(
                f"transformer.num_classes={self._classes}: the shards hold a label {len(names) - 1} ({names[-1]})"
            )
        if before and before != names:
            raise UserError(f"{workdir / CLASSES}: this run began with other classes than {folders} hold now")
        if not before:
            write_classes(workdir, names)

    def _about_text(self) -> dict[str, Any]:
        source, length = self._config.text_encoder, self._config.transformer.context_tokens
        return describe_texts(source, length, text_options(source, self._config.system_prompt))

    def _stored_text(self) -> bool:
        """Whether the records hold the text embeddings that are wanted; `UserError` where they hold others."""
        wanted = self._encoder is not None and self._config.precompute_text
        return wanted and is_precomputed(self._config.data.train_folders, TEXTS, self._about_text)

    def _stored_tokens(self) -> bool:
        """Likewise of tokens."""
        data, config, params = self._config.data, self._config.tokenizer, self._tokenizer_host
        about = functools.partial(describe_tokens, config, params, data.buckets)
        return self._config.precompute_tokens and is_precomputed(data.train_folders, TOKENS, about)

    def _text_function(self, encoder: TextEncoder, stored: bool) -> TextFunction | PlacedText:
        # The folder has the name that runs know.
        length, folder = self._config.transformer.context_tokens, self._cache_folder / "text_states"
        if not self._config.precompute_text:
            return CaptionTokens(encoder, length)
        data = self._config.data
        if stored:
            return PrecomputedTexts(data.train_folders)
        captions = load_captions(data.train_folders, data.max_bad_records)
        return cache_texts(encoder, self._about_text(), captions, length, folder)

    def _token_function(self, stored: bool) -> TokenFunction:
        data, config, params = self._config.data, self._config.tokenizer, self._tokenizer_host
        if stored:
            return PrecomputedTokens(data.train_folders)
        folder = self._cache_folder / "tokens"
        return first_process_first(
            lambda: cache_tokens(config, params, data.train_folders, folder, data.max_bad_records, self.buckets)
        )

    def _source(self, batch: Batch, base: Tokenizer) -> Any:
        """The images, or the fields of their `Tokens` where these were computed ahead."""
        if "image" in batch:
            return batch["image"]
        ends = np.cumsum(base.config.sizes)[:-1]
        f_rest, ar_input = (batch[name].astype(np.float32) for name in ("f_rest", "ar_input"))
        return tuple(np.split(batch["indices"], ends, axis=1)), f_rest, ar_input

    def _condition(self, batch: Batch) -> Any:
        """Labels, or text embeddings and mask."""
        if self._encoder is None:
            if "label" not in batch:
                raise UserError(f"{self._config.data.train_folders}: these shards hold no labels; write them anew")
            if batch["label"].max() >= self._classes:
                label = batch["label"].max()
                raise UserError(f"transformer.num_classes={self._classes}: the shards hold a label {label}")
            return batch["label"]
        return batch["text"].astype(np.float32), batch["mask"]

    def _with_states(self, encoder: TextEncoder, batch: Batch) -> dict[str, Any]:
        """The batch with `text`, states of its tokens that stay on the mesh; returns before the devices are done."""
        if jax.default_backend() == "cpu" and jax.process_count() > 1:
            # Programs of several processes on CPUs may overlap, and their collectives then meet the wrong ones.
            jax.block_until_ready(self._last_loss)
        rows = batch["input_ids"], batch["mask"]
        states = encoder.encode_batch(*make_global_batch(self._layout.batch, rows, self._config.train.batch_size))
        return {**batch, "text": states, "mask": batch["mask"][:, -self._config.transformer.context_tokens :]}

    def abstract_state(self) -> TrainState:
        return self._functions.init.shapes()

    def load_pretrained(self) -> None:
        if self._config.init_from:
            self._previous = previous_stage(load_transformer, self._config.init_from, self._config.transformer)

    def init_state(self) -> TrainState:
        if not self._config.init_from:
            return self._functions.init()
        return self._functions.from_params(put_global(self._previous, self.shardings.params))

    def step(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        loss: HartLossConfig = self._config.loss
        of_lists = self._of_buckets[int(batch.get("bucket", 0))]
        functions = draw_list(self._config.train.seed, step, of_lists)
        positions = functions.hart.config.sizes[-1]
        num_kept = draw_num_kept(self._config.train.seed, step, positions, loss)
        key = jax.random.fold_in(self._key, 1)
        rows = self._source(batch, functions.base), self._condition(batch)
        source, condition = make_global_batch(self._layout.batch, rows, self._config.train.batch_size)
        source = source if "image" in batch else Tokens(*source)
        arguments = state, self._tokenizer_params, source, condition, key
        program = functions.hart.config.shapes, num_kept
        with self._layout.activate():
            if program not in self._flops:
                traced = functions.step.trace(*arguments, num_kept)
                flops = functions.flops(traced, arguments, num_kept)
                if self._encoder is not None and "input_ids" in batch:
                    captions = self._encoder.batch_flops(len(condition[0]), batch["input_ids"].shape[1])
                    flops = StepFlops(flops.model, flops.hardware + captions)
                self._flops[program] = flops
            state, metrics = functions.step(*arguments, num_kept)
        self._last_loss = metrics["loss"]
        of_list = {}
        if len(of_lists) > 1:
            of_list[f"loss_{len(functions.hart.config.shapes)}_scales"] = metrics["loss"]
        return state, {**metrics, **of_list, **self._flops[program].metrics()}

    @functools.cached_property
    def shown(self) -> Sequence[Any]:
        """What grids show: classes, the prompts that are given, or some of the data's captions."""
        given = range(min(SHOWN, self._classes)) or self._config.sample_prompts
        return given or some_captions(self._config.data.train_folders, SHOWN)

    def sample_grids(self, state: TrainState) -> dict[str, np.ndarray]:
        """A grid of the fixed prompts (or the first classes) at each shape in each list of scales, from the averages,
        always with the same noise."""
        prompts = self.shown
        params = {"transformer": state.ema, "tokenizer": self._tokenizer_params}
        count = len(prompts)
        # Every device samples its own: of a mesh with more parts than prompts, the last one is sampled again.
        rows = jax.device_get(self._conditioner(prompts)), np.arange(count, dtype=np.int32)
        condition, indices = self._layout.put_padded(rows)
        grids = {}
        for bucket, of_lists in zip(self._shapes, self._of_buckets, strict=True):
            for number, functions in enumerate(of_lists):
                images = to_uint8(gather_to_host(functions.grid(params, condition, 0, indices, count)))
                name = f"samples_{len(functions.hart.config.shapes)}_scales" if number else "samples"
                grids[grid_name(name, bucket)] = grid(images, columns=8, captions=list(map(str, prompts)))
        return grids
