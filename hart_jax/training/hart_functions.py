"""The transformer's training as functions laid out over a mesh: `HartTask` runs it on data, a plan compiles it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hart_jax.checkpoints.model_folder import boxed_transformer
from hart_jax.config import HartExperiment, HartLossConfig, Scale, Shape, TokenizerConfig, TransformerConfig
from hart_jax.config.sizes import at_shape
from hart_jax.diffusion.schedule import DIFFUSION, Objective
from hart_jax.nn.dtypes import compute_dtype
from hart_jax.nn.flop_counter import StepFlops, count_flops, flops_of
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import parameter_axes
from hart_jax.sampling.rules import HART_RULES, Rules
from hart_jax.sampling.sampler import make_grid_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens
from hart_jax.training.hart_step import TokenLoss, make_hart_step, make_loss, token_losses, tokens_at, tokens_of
from hart_jax.training.state import TrainState, make_optimizer, new_state
from hart_jax.transformer.mask import SCALE_CAUSAL, Mask
from hart_jax.transformer.model import Hart


@dataclasses.dataclass(frozen=True)
class HartFunctions:
    """`init` makes a state, `from_params` one of parameters; `shardings` says where each of its arrays lies; `step` is
    `make_hart_step`'s, `grid` `make_grid_sampler`'s.

    `at`, of a height and width in pixels and a list of scales, gives the functions for images of that shape in that
    list: networks, `step` and `grid` are others, always the same for the same ones, and all else is shared. Its
    `UserError`s are those of `networks_at`. `base` is the tokenizer whose tokens a step takes: that of `patch_nums`.
    """

    hart: Hart
    tokenizer: Tokenizer
    optimizer: optax.GradientTransformation
    init: Program
    from_params: Program
    shardings: Any
    step: Program
    grid: Program
    loss: HartLossConfig
    token_loss: TokenLoss
    base: Tokenizer
    at: "At"

    def flops(self, traced: Any, arguments: tuple[Any, ...], num_kept: int) -> StepFlops:
        """Of a step `traced` for these arguments, or their shapes; call it where the step is traced.

        The model is the transformer with its head; the tokenizer's encoder, which makes the tokens, is frozen.
        """
        state, tokenizer_params, source, condition, _ = arguments
        batch = len(jax.tree.leaves(condition)[0])
        make = functools.partial(tokens_of, self.tokenizer)
        if isinstance(source, Tokens):
            make = functools.partial(tokens_at, self.tokenizer, self.base)
        tokens = jax.eval_shape(make, tokenizer_params, source)
        kept_BN = jax.ShapeDtypeStruct((batch, num_kept), jnp.int32)
        key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        codebook_VC = tokenizer_params["quantizer"]["codebook"]
        forward = count_flops(
            make_loss(self.hart, self.loss, self.token_loss),
            state.params,
            tokens,
            condition,
            codebook_VC,
            kept_BN,
            key_B,
        )
        return StepFlops(3 * forward, flops_of(traced.jaxpr.jaxpr))


class At(Protocol):
    """`HartFunctions.at`; no list: `patch_nums`."""

    def __call__(self, image_shape: Shape, scales: Sequence[Scale] = ...) -> HartFunctions: ...


def networks_at(
    experiment: HartExperiment, image_shape: Shape, scales: Sequence[Scale] = ()
) -> tuple[TransformerConfig, TokenizerConfig]:
    """The settings of both networks for images of this height and width in pixels in this list of scales, or in
    `patch_nums`; their parameters are the same.

    Raises:
      UserError: as `at_shape`, or there are fewer positions than masked iterations.
    """
    transformer, tokenizer = experiment.transformer, experiment.tokenizer
    if scales and tuple(scales) != transformer.patch_nums:
        transformer, tokenizer = transformer.of_list(scales), tokenizer.of_list(scales)
    transformer = at_shape(transformer, image_shape, tokenizer.downsampling)
    experiment.sample.check_fits(transformer)
    return transformer, at_shape(tokenizer, image_shape, tokenizer.downsampling)


def hart_functions(
    experiment: HartExperiment,
    layout: MeshLayout,
    *,
    mask: Mask = SCALE_CAUSAL,
    objective: Objective = DIFFUSION,
    token_loss: TokenLoss = token_losses,
    rules: Rules = HART_RULES,
) -> HartFunctions:
    """Builds it; nothing is computed or compiled yet.

    Args:
      mask: who sees whom, `objective` how the residual is learned and sampled.
      token_loss: of the indices; `rules`: of the samples that are drawn on the way.

    Raises:
      UserError: the mesh does not divide the model.
    """
    train, config = experiment.train, experiment.transformer
    layout.check_divides({"heads": config.heads, "mlp": config.mlp_width, "vocab": config.vocab_size})
    dtype = compute_dtype(train.dtype, layout.platform)
    hart = Hart(config, dtype, train.remat, train.attention, train.unroll, mask, objective)
    optimizer = make_optimizer(experiment.optimizer, train.steps)
    key = jax.random.key(train.seed)

    def init_params() -> Any:
        text = jnp.zeros((1, config.context_tokens, config.context_dim))
        condition: Any = text, jnp.ones((1, config.context_tokens), jnp.int32)
        if config.num_classes:
            condition = jnp.zeros(1, jnp.int32)
        latent = jnp.zeros((1, config.num_tokens - 1, config.latent_channels))
        kept_BN = jnp.arange(config.sizes[-1])[None]
        return hart.init(jax.random.fold_in(key, 0), condition, latent, kept_BN)["params"]

    def init() -> TrainState:
        return new_state(nn.unbox(init_params()), optimizer)

    # Traced once, for its shapes and for running it.
    program = Program("transformer init", init, layout, dtype)
    shardings = layout.state_shardings(program.shapes(), parameter_axes(boxed_transformer(config)))
    from_params = Program(
        "transformer from params", lambda params: new_state(params, optimizer), layout, dtype, out_shardings=shardings
    )
    init_there, loss, ema_decay = program.giving(shardings), experiment.loss, experiment.optimizer.ema_decay
    # Grids show the lists that are trained on.
    sample, placed = dataclasses.replace(experiment.sample, scales=()), (shardings, layout.replicated)

    def at(image_shape: Shape, scales: Sequence[Scale] = ()) -> HartFunctions:
        return at_list(image_shape, tuple(scales or config.patch_nums))

    @functools.cache
    def at_list(image_shape: Shape, scales: tuple[Scale, ...]) -> HartFunctions:
        transformer_config, tokenizer_config = networks_at(experiment, image_shape, scales)
        there, its_tokenizer = hart.clone(config=transformer_config), Tokenizer(tokenizer_config, dtype)
        base = Tokenizer(networks_at(experiment, image_shape)[1], dtype)
        step = make_hart_step(
            there, its_tokenizer, optimizer, loss, ema_decay, placed, train.accumulate, layout, token_loss, base
        )
        grid = make_grid_sampler(there, its_tokenizer, sample, layout, rules)
        return HartFunctions(
            there, its_tokenizer, optimizer, init_there, from_params, shardings, step, grid, loss, token_loss, base, at
        )

    return at(experiment.tokenizer.image_shape)
