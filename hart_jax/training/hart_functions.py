"""The transformer's training as functions laid out over a mesh: `HartTask` runs it on data, a plan compiles it."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from hart_jax.checkpoints.model_folder import boxed_transformer
from hart_jax.config import HartExperiment, HartLossConfig
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
from hart_jax.training.hart_step import TokenLoss, make_hart_step, make_loss, token_losses, tokens_of
from hart_jax.training.state import TrainState, make_optimizer, new_state
from hart_jax.transformer.mask import SCALE_CAUSAL, Mask
from hart_jax.transformer.model import Hart


@dataclasses.dataclass(frozen=True)
class HartFunctions:
    """`init` makes a state, `from_params` one of parameters; `shardings` says where each of its arrays lies; `step` is
    `make_hart_step`'s, `grid` `make_grid_sampler`'s."""

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

    def flops(self, traced: Any, arguments: tuple[Any, ...], num_kept: int) -> StepFlops:
        """Of a step `traced` for these arguments, or their shapes; call it where the step is traced.

        The model is the transformer with its head; the tokenizer's encoder, which makes the tokens, is frozen.
        """
        state, tokenizer_params, source, condition, _ = arguments
        tokens, batch = source, len(jax.tree.leaves(condition)[0])
        if not isinstance(source, Tokens):
            tokens = jax.eval_shape(functools.partial(tokens_of, self.tokenizer), tokenizer_params, source)
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
    tokenizer = Tokenizer(experiment.tokenizer, dtype)
    optimizer = make_optimizer(experiment.optimizer, train.steps)
    key = jax.random.key(train.seed)

    def init_params() -> Any:
        text = jnp.zeros((1, config.context_tokens, config.context_dim))
        condition: Any = text, jnp.ones((1, config.context_tokens), jnp.int32)
        if config.num_classes:
            condition = jnp.zeros(1, jnp.int32)
        latent = jnp.zeros((1, config.num_tokens - 1, config.latent_channels))
        kept_BN = jnp.arange(config.patch_nums[-1] ** 2)[None]
        return hart.init(jax.random.fold_in(key, 0), condition, latent, kept_BN)["params"]

    def init() -> TrainState:
        return new_state(nn.unbox(init_params()), optimizer)

    # Traced once, for its shapes and for running it.
    program = Program("transformer init", init, layout, dtype)
    shardings = layout.state_shardings(program.shapes(), parameter_axes(boxed_transformer(config)))
    step = make_hart_step(
        hart,
        tokenizer,
        optimizer,
        experiment.loss,
        experiment.optimizer.ema_decay,
        (shardings, layout.replicated),
        train.accumulate,
        layout,
        token_loss,
    )
    from_params = Program(
        "transformer from params", lambda params: new_state(params, optimizer), layout, dtype, out_shardings=shardings
    )
    grid = make_grid_sampler(hart, tokenizer, experiment.sample, layout, rules)
    init_there = program.giving(shardings)
    return HartFunctions(
        hart, tokenizer, optimizer, init_there, from_params, shardings, step, grid, experiment.loss, token_loss
    )
