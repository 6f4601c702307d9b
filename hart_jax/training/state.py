"""What a training run carries from step to step, and the optimiser that moves it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hart_jax.config import OptimizerConfig

Params = Any


class TrainState(flax.struct.PyTreeNode):
    """`ema` is the exponential moving average of `params`, in float32. Randomness is a function of (seed, step)."""

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, learning rate as `learning_rate_schedule`; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        ),
    )


def _decays(path: tuple[Any, ...], param: jax.Array) -> bool:
    # Biases and scales of stacked layers have two axes or more too, so the name decides.
    name = str(path[-1].key)
    return param.ndim >= 2 and "bias" not in name and "scale" not in name


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to `final_fraction` of the peak at the last step."""
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        remaining = max(1, steps - config.warmup_steps)
        after = optax.cosine_decay_schedule(config.learning_rate, remaining, config.final_fraction)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    # The copy keeps `ema` a buffer of its own, as donation needs.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation, ema_decay: float
) -> TrainState:
    """One optimiser step; the average warms up as (1 + step) / (10 + step), so that a short run has one too."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    return state.replace(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def compute_dtype(setting: str) -> jnp.dtype:
    """ "auto" is bfloat16 where the device multiplies it natively (TPU, GPU), float32 elsewhere."""
    if setting == "auto":
        return jnp.dtype(jnp.bfloat16 if jax.default_backend() in ("tpu", "gpu") else jnp.float32)
    return jnp.dtype(setting)
