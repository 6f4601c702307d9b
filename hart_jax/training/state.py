"""What a training run carries from step to step, and the optimiser that moves it."""

import functools
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
import optax.contrib

from hart_jax.config import OptimizerConfig

Params = Any
Metrics = dict[str, jax.Array]
Tree = TypeVar("Tree")


class TrainState(flax.struct.PyTreeNode):
    """`ema` is the exponential moving average of `params`, in float32. Randomness is a function of (seed, step)."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that also says its learning rate after a number of updates."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: optax.Schedule


def make_optimizer(config: OptimizerConfig, steps: int) -> Optimizer:
    """AdamW, or Muon where the config has a rate for it, after clipping by the global norm; only matrices decay."""
    rate = learning_rate_schedule(config, steps)
    decays = functools.partial(jax.tree_util.tree_map_with_path, _decays)
    adamw = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays)
    clip = optax.clip_by_global_norm(config.clip_norm)
    if not config.muon_learning_rate:
        chain = optax.chain(clip, adamw)
        return Optimizer(chain.init, chain.update, rate)
    factor = config.muon_learning_rate / config.learning_rate
    muon = optax.contrib.muon(
        lambda step: factor * rate(step),
        weight_decay=config.weight_decay,
        # Updates as large as Adam's usual ones.
        consistent_rms=0.2,
        muon_weight_dimension_numbers=functools.partial(jax.tree_util.tree_map_with_path, _muon_axes),
    )
    labels = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: "muon" if _muon_axes(path) else "adamw"
    )
    chain = optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, labels))
    return Optimizer(chain.init, chain.update, rate)


def _decays(path: tuple[Any, ...], param: jax.Array) -> bool:
    # Biases and scales of stacked layers have two axes or more too, so the name decides.
    name = str(path[-1].key)
    return param.ndim >= 2 and "bias" not in name and "scale" not in name


def _muon_axes(path: tuple[Any, ...], _: Any = None) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter make the matrix that Muon orthogonalises; None for what is no matrix of a block."""
    names = [str(entry.key) for entry in path if hasattr(entry, "key")]
    if "layers" not in names or "ada_lin" in names:
        return None
    if names[-1] == "qkv":  # (layers, W, 3, H, K): one matrix each for q, k and v
        return optax.contrib.MuonDimensionNumbers(1, (3, 4))
    return optax.contrib.MuonDimensionNumbers(1, 2) if names[-1] == "kernel" else None


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, or a line or a cosine to `final_fraction` of the peak at the last step."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    remaining = max(1, steps - config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.learning_rate, config.final_fraction * config.learning_rate, remaining)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, remaining, config.final_fraction)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def new_state(params: Params, optimizer: Optimizer) -> TrainState:
    # The copy keeps `ema` a buffer of its own, as donation needs.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def apply_gradients(
    state: TrainState, grads: Params, loss: jax.Array, optimizer: Optimizer, ema_decay: float
) -> tuple[TrainState, Metrics]:
    """One optimiser step and its metrics.

    Where the loss, the gradients' norm or the learning rate is not finite, only the step counter moves and
    `skipped_steps` is 1. To look at the new parameters too before the old ones are given up would hold both in memory:
    `param_norm` says what became of them, and `MetricsBuffer` ends the run.

    The average warms up as (1 + step) / (10 + step), so that a short run has one too.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    gradient_norm = optax.tree.norm(grads)
    # Skipped steps do not count for optax, all of whose counters agree.
    [(_, updates_done), *_] = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    rate = optimizer.learning_rate(updates_done)
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(rate)
    updated = state.replace(params=params, ema=ema, opt_state=opt_state)
    after = select(finite, updated, state).replace(step=state.step + 1)
    metrics = {
        "learning_rate": rate,
        "gradient_norm": gradient_norm,
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(after.params),
        "skipped_steps": jnp.where(finite, 0.0, 1.0),
    }
    return after, metrics


def all_finite(tree: Any) -> jax.Array:
    """Whether no array of a tree holds infinity or NaN."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def select(finite: jax.Array, after: Tree, before: Tree) -> Tree:
    """The tree after a step, or the one before it."""
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
