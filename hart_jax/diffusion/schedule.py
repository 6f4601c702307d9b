"""Diffusion of the residual: cosine schedule, learned-range variance, respaced sampling (improved DDPM; SPEC.md 4).

Rows are tokens: x, noise (N, C). Targets are divided by RESIDUAL_SCALE before, samples multiplied by it after.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.nn.guidance import guide

RESIDUAL_SCALE = 0.6
TRAIN_STEPS = 1000

# (x_t (N, C), t (N,) or one for all (1,), z (N, W)) -> (N, 2C)
Network = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class DiffusionLoss:
    """Per row (N,): loss = mse + vb (bits per dimension)."""

    loss: jax.Array
    mse: jax.Array
    vb: jax.Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Constants of a chain, one value per step, ascending in time; `timesteps` are the original ones, 0..999."""

    timesteps: np.ndarray
    betas: np.ndarray

    @classmethod
    def training(cls) -> "Schedule":
        """All 1000 steps: alpha_bar(t) = cos^2((t + 0.008) / 1.008 * pi / 2), beta at most 0.999."""
        t = np.arange(TRAIN_STEPS + 1) / TRAIN_STEPS
        alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls(np.arange(TRAIN_STEPS), np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999))

    @classmethod
    def respaced(cls, steps: int) -> "Schedule":
        """`steps` of the 1000, evenly spaced from the first to the last, with the same alpha_bar there."""
        stride = (TRAIN_STEPS - 1) / (steps - 1)
        # Summed up, not multiplied, as in the original: where a product would end in .5, rounding sees the difference.
        chosen = np.array([round(t) for t in itertools.accumulate([stride] * (steps - 1), initial=0.0)])
        alpha_bar = np.cumprod(1 - cls.training().betas)[chosen]
        return cls(chosen, 1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))

    def constants(self) -> dict[str, np.ndarray]:
        """Coefficients that the formulas below use, float32, (steps,)."""
        alphas = 1 - self.betas
        alpha_bar = np.cumprod(alphas)
        previous = np.append(1.0, alpha_bar[:-1])
        variance = self.betas * (1 - previous) / (1 - alpha_bar)
        values = {
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1 - alpha_bar),
            "sqrt_recip_alpha_bar": np.sqrt(1 / alpha_bar),
            "sqrt_recip_minus_one": np.sqrt(1 / alpha_bar - 1),
            "mean_x0": self.betas * np.sqrt(previous) / (1 - alpha_bar),
            "mean_xt": (1 - previous) * np.sqrt(alphas) / (1 - alpha_bar),
            "log_beta": np.log(self.betas),
            # The first variance is 0: its logarithm is replaced by the second's.
            "log_variance": np.log(np.append(variance[1], variance[1:])),
        }
        return {name: value.astype(np.float32) for name, value in values.items()}


def diffusion_loss(
    network: Network, target_NC: jax.Array, z_NW: jax.Array, t_N: jax.Array, noise_NC: jax.Array
) -> DiffusionLoss:
    """Training loss per row of residuals `target` (before the division), at the times t with this noise."""
    c = {name: jnp.asarray(value)[t_N][:, None] for name, value in Schedule.training().constants().items()}
    x0 = target_NC / RESIDUAL_SCALE
    x_t = c["sqrt_alpha_bar"] * x0 + c["sqrt_one_minus_alpha_bar"] * noise_NC
    eps, interpolation = jnp.split(network(x_t, t_N, z_NW), 2, axis=-1)
    mse = jnp.mean((noise_NC - eps) ** 2, axis=-1)
    # The variance term trains the variance alone: the mean is frozen in it.
    predicted_x0 = c["sqrt_recip_alpha_bar"] * x_t - c["sqrt_recip_minus_one"] * jax.lax.stop_gradient(eps)
    mean = c["mean_x0"] * predicted_x0 + c["mean_xt"] * x_t
    true_mean = c["mean_x0"] * x0 + c["mean_xt"] * x_t
    log_variance = _log_variance(interpolation, c)
    kl = 0.5 * (
        -1.0
        + log_variance
        - c["log_variance"]
        + jnp.exp(c["log_variance"] - log_variance)
        + (true_mean - mean) ** 2 * jnp.exp(-log_variance)
    )
    first = -_discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    vb = jnp.mean(jnp.where(t_N[:, None] == 0, first, kl), axis=-1) / np.log(2.0)
    return DiffusionLoss(mse + vb, mse, vb)


def _log_variance(interpolation: jax.Array, c: dict[str, jax.Array]) -> jax.Array:
    fraction = (interpolation + 1) / 2
    return fraction * c["log_beta"] + (1 - fraction) * c["log_variance"]


def _discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log P of the 1/255-wide bin around x, with the tanh approximation of the normal CDF."""

    def cdf(y):
        return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (y + 0.044715 * y**3)))

    inverse = jnp.exp(-log_scale)
    upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    inside = jnp.log(jnp.maximum(upper - lower, 1e-12))
    below, above = jnp.log(jnp.maximum(upper, 1e-12)), jnp.log(jnp.maximum(1 - lower, 1e-12))
    return jnp.where(x < -0.999, below, jnp.where(x > 0.999, above, inside))


def sample_residual(
    network: Network,
    z_MW: jax.Array,
    init_noise_NC: jax.Array,
    step_noise_SMC: jax.Array | None,
    cfg: float | jax.Array,
    steps: int,
) -> jax.Array:
    """Guided ancestral sampling of residuals (M, C), M = 2N: N conditional rows of z, then N unconditional ones.

    Args:
      init_noise_NC: where both halves start.
      step_noise_SMC: noise of the k-th step taken, or None for none.
      cfg: guidance t in (1 + t) eps_cond - t eps_uncond, as `guide` takes it; both halves use the guided noise of the
        first half's x.

    Returns:
      Both halves; the first is the sample.
    """
    schedule = Schedule.respaced(steps)
    constants = schedule.constants()

    def step(x_MC, inputs):
        c, t, noise_MC = inputs
        half_NC = x_MC[: len(x_MC) // 2]
        doubled = jnp.concatenate([half_NC, half_NC])
        eps, interpolation = jnp.split(network(doubled, t[None], z_MW), 2, axis=-1)
        cond, uncond = jnp.split(eps, 2)
        both = guide(cond, uncond, cfg)
        eps = jnp.concatenate([both, both])
        x0 = jnp.clip(c["sqrt_recip_alpha_bar"] * x_MC - c["sqrt_recip_minus_one"] * eps, -1.0, 1.0)
        mean = c["mean_x0"] * x0 + c["mean_xt"] * x_MC
        spread = jnp.where(t == 0, 0.0, jnp.exp(0.5 * _log_variance(interpolation, c)))
        return mean + spread * noise_MC, None

    x_MC = jnp.concatenate([init_noise_NC, init_noise_NC])
    if step_noise_SMC is None:
        step_noise_SMC = jnp.zeros((steps, *x_MC.shape), x_MC.dtype)
    descending = {name: jnp.asarray(value[::-1].copy()) for name, value in constants.items()}
    times = jnp.asarray(schedule.timesteps[::-1].copy(), jnp.int32)
    x_MC, _ = jax.lax.scan(step, x_MC, (descending, times, step_noise_SMC))
    return x_MC * RESIDUAL_SCALE


class Objective(Protocol):
    """How the head learns residuals and samples them; hashable, as a part of `Hart`."""

    def loss(
        self, network: Network, target_NC: jax.Array, z_NW: jax.Array, t_N: jax.Array, noise_NC: jax.Array
    ) -> DiffusionLoss:
        """As `diffusion_loss`; `t` are whole numbers, 0..999, evenly drawn."""
        ...

    def sample(
        self,
        network: Network,
        z_MW: jax.Array,
        init_noise_NC: jax.Array,
        step_noise_SMC: jax.Array | None,
        cfg: float | jax.Array,
        steps: int,
    ) -> jax.Array:
        """As `sample_residual`."""
        ...


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """HART's objective."""

    loss = staticmethod(diffusion_loss)
    sample = staticmethod(sample_residual)


DIFFUSION = Diffusion()
