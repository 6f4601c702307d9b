"""The tokenizer's training as programs laid out over a mesh: `TokenizerTask` runs them on data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hart_jax.config import Shape, TokenizerExperiment
from hart_jax.config.sizes import at_shape
from hart_jax.io.images import from_uint8
from hart_jax.nn.dtypes import compute_dtype
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import parameter_axes
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.state import make_optimizer
from hart_jax.training.tokenizer_step import (
    TokenizerState,
    init_tokenizer_state,
    make_tokenizer_step,
    tokenizer_flops,
    tokenizer_state,
)


@dataclasses.dataclass(frozen=True)
class TokenizerFunctions:
    """`init` makes a state of images (B, H, W, 3) uint8, of which the first `count` (static) give the codebook its
    start; `from_params` one of parameters. `shardings` says where each of its arrays lies, `abstract_state` its shapes.
    `step` is `make_tokenizer_step`'s. `reconstruct`, of parameters, images and a count, gives the discrete and the
    hybrid reconstructions of the first so many, whole on every device.

    `at`, of a height and width in pixels, gives the functions for images of that shape: `tokenizer`, `step` and
    `reconstruct` are others, always the same for the same shape, and all else is shared. Its `UserError`s are those of
    `at_shape`.
    """

    init: Program
    from_params: Program
    abstract_state: TokenizerState
    shardings: Any
    step: Program
    reconstruct: Program
    tokenizer: Tokenizer
    at: Callable[[Shape], "TokenizerFunctions"]

    def flops(self, arguments: tuple[Any, ...]) -> StepFlops:
        """Of a step with these arguments; call it where the step is traced."""
        state, image, *_ = arguments
        return tokenizer_flops(self.step.trace(*arguments), self.tokenizer, state, image)


def tokenizer_functions(experiment: TokenizerExperiment, layout: MeshLayout) -> TokenizerFunctions:
    """Builds them; nothing is computed or compiled yet."""
    train, loss, shape = experiment.train, experiment.loss, experiment.tokenizer.image_shape
    dtype = compute_dtype(train.dtype, layout.platform)
    tokenizer, optimizer = Tokenizer(experiment.tokenizer, dtype), make_optimizer(experiment.optimizer, train.steps)
    key, freeze, adversarial = jax.random.key(train.seed), experiment.freeze, loss.adversarial > 0

    def init(images: jax.Array, count: int) -> TokenizerState:
        start = jax.random.fold_in(key, 0)
        return init_tokenizer_state(start, tokenizer, optimizer, images, freeze, adversarial, count)

    def from_params(params: Any) -> TokenizerState:
        return tokenizer_state(jax.random.fold_in(key, 0), params, optimizer, shape, freeze, adversarial)

    image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.float32)
    boxed = jax.eval_shape(tokenizer.init, key, image)["params"]
    axes = dict(parameter_axes(boxed))
    if adversarial:
        axes = {**parameter_axes(jax.eval_shape(Discriminator().init, key, image)["params"]), **axes}
    abstract_state = jax.eval_shape(from_params, nn.unbox(boxed))
    shardings = layout.state_shardings(abstract_state, axes)
    init_there = Program("tokenizer init", init, layout, dtype, static_argnums=1, out_shardings=shardings)
    from_params_there = Program("tokenizer from params", from_params, layout, dtype, out_shardings=shardings)
    ema_decay, placed = experiment.optimizer.ema_decay, (shardings, layout.replicated)

    @functools.cache
    def at(image_shape: Shape) -> TokenizerFunctions:
        there = Tokenizer(at_shape(experiment.tokenizer, image_shape, experiment.tokenizer.downsampling), dtype)
        step = make_tokenizer_step(there, optimizer, loss, ema_decay, placed, train.accumulate, layout)
        reconstruct = functools.partial(_reconstruct, there)
        grid = Program("tokenizer grid", reconstruct, layout, dtype, static_argnums=2, out_shardings=layout.replicated)
        return TokenizerFunctions(init_there, from_params_there, abstract_state, shardings, step, grid, there, at)

    return at(shape)


def _reconstruct(tokenizer: Tokenizer, params: Any, images: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    image = from_uint8(images)
    discrete, hybrid = (
        tokenizer.apply({"params": params}, image, continuous=continuous, method="reconstruct")
        for continuous in (False, True)
    )
    return discrete[:count], hybrid[:count]
