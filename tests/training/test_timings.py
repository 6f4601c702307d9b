"""Timings add up and start anew; a profile is written for the steps asked for."""

import jax
import jax.numpy as jnp
import pytest

from hart_jax.nn.flop_counter import StepFlops
from hart_jax.training import timings
from hart_jax.training.timings import PROFILE_DIR, Profile, Stopwatch


class Device:
    device_kind = "TPU v5p"

    def __init__(self, in_use: int):
        self._in_use = in_use

    def memory_stats(self):
        return {"bytes_in_use": self._in_use, "peak_bytes_in_use": 2 * self._in_use}


def test_a_window_of_steps(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(timings.time, "monotonic", lambda: next(clock))
    devices = [Device(5), Device(7)]
    for name, value in (("devices", devices), ("local_devices", devices), ("device_count", 2)):
        monkeypatch.setattr(jax, name, lambda value=value: value)
    stopwatch = Stopwatch(batch_size=4)
    for what in ("data", "checkpoint"):
        with stopwatch.waiting(what):
            stopwatch.step()
    assert stopwatch.images == 8
    values = stopwatch.read(StepFlops(model=459e12, hardware=2 * 459e12))
    assert values == pytest.approx(
        {
            "images_per_second": 8 / 10,
            "step_seconds": (10 - 3) / 2,
            "data_wait_seconds": 0.5,
            "checkpoint_wait_seconds": 1.5,
            "pictures_wait_seconds": 0.0,
            "device_memory_bytes": 7,
            "device_memory_peak_bytes": 14,
            "mfu": 1 / 3.5 / 2,
            "hfu": 2 / 3.5 / 2,
        }
    )
    stopwatch.step()
    assert stopwatch.read(StepFlops(0.0, 0.0))["images_per_second"] == 4


def test_unknown_devices_give_no_utilisation(monkeypatch):
    monkeypatch.setattr(Device, "device_kind", "a new one")
    monkeypatch.setattr(jax, "devices", lambda: [Device(1)])
    stopwatch = Stopwatch(batch_size=1)
    stopwatch.step()
    assert not {"mfu", "hfu"} & set(stopwatch.read(StepFlops(1.0, 1.0)))


@pytest.mark.parametrize("steps", [(), (2, 3), (2, 9)])
def test_profile(tmp_path, steps):
    with Profile(tmp_path, steps) as profile:
        for step in range(1, 5):
            profile.before(step)
            profile.after(step, jnp.ones(3) * step)
            traces = list((tmp_path / PROFILE_DIR).rglob("*.xplane.pb"))
            assert bool(traces) == (steps == (2, 3) and step >= 3)
    assert bool(list((tmp_path / PROFILE_DIR).rglob("*.xplane.pb"))) == bool(steps)
