"""The diffusion of residuals: schedule, training loss, guided sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.diffusion.schedule import RESIDUAL_SCALE, Schedule, diffusion_loss, sample_residual

ROWS, CHANNELS, WIDTH = 32, 3, 5


def alpha_bar(schedule: Schedule) -> np.ndarray:
    return np.cumprod(1 - schedule.betas)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def batch():
    """Residuals, conditions, times (both ends among them) and noise."""
    times = np.random.default_rng(0).integers(0, 1000, ROWS)
    times[:3] = 0, 1, 999
    target = np.clip(0.3 * normal(1, ROWS, CHANNELS), -0.6, 0.6)
    return target, normal(2, ROWS, WIDTH), times, normal(3, ROWS, CHANNELS)


def test_cosine_schedule():
    schedule = Schedule.training()
    t = (np.arange(1000) + 1) / 1000
    expected = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    # The last steps' betas are capped.
    np.testing.assert_allclose(alpha_bar(schedule)[:-2], expected[:-2], rtol=1e-9)
    assert schedule.betas.max() == 0.999 and schedule.betas.min() > 0


@given(st.integers(2, 1000))
def test_respacing_keeps_alpha_bar(steps):
    schedule = Schedule.respaced(steps)
    assert len(schedule.timesteps) == steps
    assert schedule.timesteps[0] == 0 and schedule.timesteps[-1] == 999
    assert (np.diff(schedule.timesteps) > 0).all()
    np.testing.assert_allclose(alpha_bar(schedule), alpha_bar(Schedule.training())[schedule.timesteps], rtol=1e-6)


def test_noising(batch):
    target, z, times, noise = batch
    seen = []
    diffusion_loss(lambda x, t, z: seen.append(x) or jnp.zeros((ROWS, 2 * CHANNELS)), target, z, times, noise)
    kept = alpha_bar(Schedule.training())[times][:, None]
    expected = np.sqrt(kept) * target / RESIDUAL_SCALE + np.sqrt(1 - kept) * noise
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-6)


def test_noised_residuals_have_the_variance_of_the_chain():
    """With residuals of unit variance (after the division) x_t has unit variance at every time."""
    rows = 20_000
    target, noise = RESIDUAL_SCALE * normal(0, rows, 1), normal(1, rows, 1)
    for time in (0, 300, 999):
        seen = []
        times = np.full(rows, time)
        diffusion_loss(lambda x, t, z: seen.append(x) or jnp.zeros((rows, 2)), target, None, times, noise)  # noqa: B023
        assert float(jnp.mean(seen[0])) == pytest.approx(0, abs=0.03)
        assert float(jnp.var(seen[0])) == pytest.approx(1, abs=0.05)


def test_a_perfect_network_has_no_loss(batch):
    target, z, times, noise = batch
    # Interpolation -1 is the true posterior's variance.
    perfect = diffusion_loss(
        lambda x, t, z: jnp.concatenate([noise, -jnp.ones_like(noise)], -1), target, z, times, noise
    )
    np.testing.assert_array_equal(perfect.mse, 0)
    np.testing.assert_allclose(np.asarray(perfect.vb)[times > 0], 0, atol=1e-3)


def test_loss_is_mse_plus_a_bound_that_is_never_negative(batch):
    target, z, times, noise = batch
    loss = diffusion_loss(lambda x, t, z: jnp.asarray(normal(4, ROWS, 2 * CHANNELS)), target, z, times, noise)
    np.testing.assert_allclose(loss.loss, loss.mse + loss.vb, rtol=1e-6)
    assert (np.asarray(loss.vb) >= -1e-6).all()
    assert np.isfinite(loss.loss).all()


def test_the_variance_term_trains_the_variance_alone(batch):
    target, z, times, noise = batch

    def vb(eps, interpolation):
        network = lambda x, t, z: jnp.concatenate([eps, interpolation], -1)  # noqa: E731
        return diffusion_loss(network, target, z, times, noise).vb.sum()

    eps, interpolation = jnp.asarray(normal(5, ROWS, CHANNELS)), jnp.asarray(normal(6, ROWS, CHANNELS))
    by_eps, by_interpolation = jax.jit(jax.grad(vb, argnums=(0, 1)))(eps, interpolation)
    np.testing.assert_array_equal(by_eps, 0)
    assert np.abs(by_interpolation).max() > 0


def oracle(x0):
    """A network that knows the residual (after the division) behind every x_t."""
    constants = Schedule.training().constants()

    def network(x, t, z):
        c = {name: jnp.asarray(value)[t][:, None] for name, value in constants.items()}
        eps = (x - c["sqrt_alpha_bar"] * x0) / c["sqrt_one_minus_alpha_bar"]
        return jnp.concatenate([eps, jnp.zeros_like(eps)], -1)

    return network


@pytest.mark.parametrize("steps", [2, 8, 20])
def test_sampling_finds_what_the_network_knows(steps):
    x0 = np.clip(0.4 * normal(0, 4, CHANNELS), -1, 1)
    start, noise = normal(1, 4, CHANNELS), normal(2, steps, 8, CHANNELS)
    out = sample_residual(oracle(np.tile(x0, (2, 1))), np.zeros((8, WIDTH)), start, noise, 2.0, steps)
    np.testing.assert_allclose(out[:4], x0 * RESIDUAL_SCALE, atol=1e-5)


def test_guidance_extrapolates_from_the_unconditional_half():
    z = np.concatenate([np.ones((4, WIDTH)), np.zeros((4, WIDTH))]).astype(np.float32)
    cond, uncond, t = 0.3, 0.1, 1.5

    def network(x, times, z):
        eps = jnp.broadcast_to(jnp.where(z[:, :1] > 0, cond, uncond), x.shape)
        return jnp.concatenate([eps, jnp.zeros_like(eps)], -1)

    def already_guided(x, times, z):
        eps = jnp.full(x.shape, (1 + t) * cond - t * uncond)
        return jnp.concatenate([eps, jnp.zeros_like(eps)], -1)

    start = normal(1, 4, CHANNELS)
    out = sample_residual(network, z, start, None, t, 8)
    np.testing.assert_allclose(out, sample_residual(already_guided, z, start, None, 0.0, 8), atol=1e-6)


def test_samples_stay_in_range():
    out = sample_residual(
        lambda x, t, z: 5 * jnp.ones((len(x), 2 * CHANNELS)), np.zeros((8, WIDTH)), normal(1, 4, CHANNELS), None, 0.0, 8
    )
    assert np.abs(out).max() <= RESIDUAL_SCALE + 1e-6
