"""Logged means span checkpoints and leave out skipped steps; too many of those in a row end the run."""

import json
import math

import jax.numpy as jnp
import pytest

from hart_jax.errors import UserError
from hart_jax.training.metrics_buffer import MetricsBuffer


def add(buffer: MetricsBuffer, step: int, loss: float, **more: float) -> None:
    skipped = not math.isfinite(loss)
    values = {"loss": loss, "skipped_steps": skipped, **more}
    buffer.add(step, {name: jnp.float32(value) for name, value in values.items()})


def test_a_window_stored_half_way_gives_the_same_means():
    whole, half = MetricsBuffer(3), MetricsBuffer(3)
    for step in (1, 2):
        add(whole, step, step / 7, early=step / 9)
        add(half, step, step / 7, early=step / 9)
    half = MetricsBuffer(3, json.loads(json.dumps(half.stored())))
    for step in (3, 4, 5):
        add(whole, step, step / 7)
        add(half, step, step / 7)
    means = whole.close()
    assert half.close() == means
    assert means["early"] == pytest.approx(1.5 / 9) and means["loss"] == pytest.approx(3 / 7)


def test_skipped_steps_are_counted_and_left_out_of_the_means():
    buffer = MetricsBuffer(3)
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0), 1):
        add(buffer, step, loss)
    assert buffer.close() == {"loss": 1.5, "skipped_steps": 2}
    add(buffer, 5, math.nan)
    assert math.isnan(buffer.close()["loss"])


def test_too_many_in_a_row_name_the_step():
    buffer = MetricsBuffer(3)
    for step, loss in enumerate((1.0, math.nan, math.nan, 1.0, math.nan), 1):
        add(buffer, step, loss)
    buffer.close()
    buffer = MetricsBuffer(3, json.loads(json.dumps(buffer.stored())))
    add(buffer, 6, math.nan)
    buffer.stored()
    add(buffer, 7, math.nan)
    add(buffer, 8, 1.0)
    with pytest.raises(UserError, match="step 7: the loss or the gradients were not finite, as in all of the last 3"):
        buffer.stored()


def test_parameters_that_are_not_finite_end_the_run_before_they_are_saved():
    buffer = MetricsBuffer(max_skipped=3)
    good = {"loss": jnp.float32(1.0), "param_norm": jnp.float32(2.0), "skipped_steps": jnp.float32(0.0)}
    buffer.add(1, good)
    buffer.stored()
    buffer.add(2, good | {"param_norm": jnp.float32(jnp.inf)})
    with pytest.raises(UserError, match="step 2: the parameters are not finite any more"):
        buffer.stored()
