"""Training the transformer on images and captions, with a frozen tokenizer and text encoder, as a task of the loop."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import HartLossConfig
from hart_jax.data.pipeline import load_captions, make_loader
from hart_jax.data.text_states import precompute
from hart_jax.errors import UserError
from hart_jax.experiment import HartExperiment
from hart_jax.generate import make_sampler
from hart_jax.images import grid, to_uint8
from hart_jax.parallel.mesh import data_mesh, replicated
from hart_jax.text.encoder import load_text_encoder
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_step import make_hart_step
from hart_jax.training.loop import Batch
from hart_jax.training.state import TrainState, compute_dtype, make_optimizer, new_state
from hart_jax.training.workdir import load_tokenizer
from hart_jax.transformer.model import Hart
from hart_jax.transformer.subsample import draw_keep_count


class HartTask:
    """See `hart_jax.training.loop.Task`. Text states are cached in `cache_folder`."""

    def __init__(self, experiment: HartExperiment, cache_folder: Path):
        train, config = experiment.train, experiment.transformer
        if not experiment.sample_prompts:
            raise UserError("sample_prompts is empty: give the prompts that sample grids show")
        self._config, self._cache_folder = experiment, cache_folder
        dtype = compute_dtype(train.dtype)
        self._hart = Hart(config, dtype)
        self._tokenizer = Tokenizer(experiment.tokenizer, dtype)
        tokenizer_params = load_tokenizer(experiment.tokenizer_from, experiment.tokenizer)
        self._tokenizer_params = jax.device_put(tokenizer_params, replicated(data_mesh(train.batch_size)))
        self._encoder = load_text_encoder(experiment.text_encoder)
        if self._encoder.context_dim != config.context_dim:
            width = self._encoder.context_dim
            raise UserError(f"transformer.context_dim={config.context_dim}: the text encoder's states are {width} wide")
        self._optimizer = make_optimizer(experiment.optimizer, train.steps)
        self._key = jax.random.key(train.seed)
        self._step = make_hart_step(
            self._hart, self._tokenizer, self._optimizer, experiment.loss, experiment.optimizer.ema_decay
        )
        self._sampler = make_sampler(self._hart, self._tokenizer, experiment.sample)

    def batches(self) -> Iterator[Batch]:
        data, length = self._config.data, self._config.transformer.context_tokens
        if self._config.precompute_text:
            text: Any = precompute(self._encoder, load_captions(data.train), length, self._cache_folder / "text_states")
        else:
            text = self._tokenize
        return make_loader(
            data.train,
            image_size=self._config.tokenizer.image_size,
            batch_size=self._config.train.batch_size,
            seed=self._config.train.seed,
            text=text,
            flip=data.flip,
            cache=data.cache,
            workers=data.workers,
        )

    def _tokenize(self, caption: str) -> dict[str, np.ndarray]:
        input_ids, mask, _ = self._encoder.tokenize([caption], self._config.transformer.context_tokens)
        return {"input_ids": input_ids[0], "mask": mask[0]}

    def _condition(self, batch: Batch) -> tuple[Any, Any]:
        length = self._config.transformer.context_tokens
        states = batch["text"] if "text" in batch else self._encoder.encode(batch["input_ids"], batch["mask"])
        return jnp.asarray(states, jnp.float32), batch["mask"][:, -length:]

    def init(self) -> TrainState:
        config, batch = self._config.transformer, 1
        condition = (
            jnp.zeros((batch, config.context_tokens, config.context_dim)),
            jnp.ones((batch, config.context_tokens), jnp.int32),
        )
        latent = jnp.zeros((batch, config.num_tokens - 1, config.latent_channels))
        kept = jnp.arange(config.patch_nums[-1] ** 2)[None]
        variables = self._hart.init(jax.random.fold_in(self._key, 0), condition, latent, kept)
        return new_state(nn.unbox(variables["params"]), self._optimizer)

    def step(self, state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict[str, jax.Array]]:
        loss: HartLossConfig = self._config.loss
        positions = self._config.transformer.patch_nums[-1] ** 2
        kept = draw_keep_count(self._config.train.seed, step, positions, loss)
        key = jax.random.fold_in(self._key, 1)
        return self._step(state, self._tokenizer_params, batch["image"], self._condition(batch), key, kept)

    def pictures(self, state: TrainState) -> dict[str, np.ndarray]:
        """A grid of the fixed prompts, from the averaged parameters, always with the same noise."""
        prompts = self._config.sample_prompts
        states = self._encoder(list(prompts), self._config.transformer.context_tokens)
        params = {"transformer": state.ema, "tokenizer": self._tokenizer_params}
        images, _ = self._sampler(params, (states.states_BTD, states.mask_BT), 0, jnp.arange(len(prompts)))
        return {"samples": grid(to_uint8(jax.device_get(images)), columns=8, captions=prompts)}
