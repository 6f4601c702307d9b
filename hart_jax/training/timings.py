"""Where a run's time and memory go."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from hart_jax.io.local_side import LocalSide
from hart_jax.nn.flop_counter import StepFlops, peak_flops

PROFILE_DIR = "profile"


class Stopwatch:
    """Times the steps between two readings. The first reading includes compilation."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._start()

    def _start(self) -> None:
        self._since, self._steps = time.monotonic(), 0
        self._waits = {"data": 0.0, "checkpoint": 0.0, "pictures": 0.0}

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Time in which the loop waits for "data", "checkpoint" or "pictures"."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waits[what] += time.monotonic() - start

    def step(self) -> None:
        self._steps += 1

    @property
    def images(self) -> int:
        """Images trained on since the last reading."""
        return self._steps * self._batch_size

    def read(self, flops: StepFlops) -> dict[str, float]:
        """Images/s; seconds per step, without checkpoints and images, and the waits per step; memory; utilisation.

        Memory, in bytes, is that of the fullest local device, where the backend reports it. Utilisations, in [0, 1],
        are the FLOPs of a step over what all devices could do meanwhile in bfloat16, where their peak is known: "mfu"
        of the model's, "hfu" of the hardware's (see `StepFlops`).
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        step_seconds = max(seconds - self._waits["checkpoint"] - self._waits["pictures"], 1e-9) / self._steps
        values = {
            "images_per_second": self.images / seconds,
            "step_seconds": step_seconds,
            **{f"{what}_wait_seconds": wait / self._steps for what, wait in self._waits.items()},
            **_memory(),
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None:
            possible = step_seconds * peak * jax.device_count()
            values |= {"mfu": flops.model / possible, "hfu": flops.hardware / possible}
        self._start()
        return values


def _memory() -> dict[str, float]:
    reports = [device.memory_stats() or {} for device in jax.local_devices()]
    names = {"bytes_in_use": "device_memory_bytes", "peak_bytes_in_use": "device_memory_peak_bytes"}
    return {
        ours: float(max(report[name] for report in reports))
        for name, ours in names.items()
        if all(name in report for report in reports)
    }


class Profile:
    """An XProf trace of the steps `steps` = (first, last) in the workdir's `profile`; none if `steps` is empty."""

    def __init__(self, workdir: Path, steps: tuple[int, ...]):
        self._workdir = workdir
        self._first, self._last = steps or (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        if not self._running and self._first <= step <= self._last:
            self._side = LocalSide(self._workdir, "profile")
            jax.profiler.start_trace(self._side.folder / PROFILE_DIR)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """`result` are the step's arrays: the trace ends when they are there."""
        if self._running and step == self._last:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._side.push()
        self._running = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        if self._running:
            self._stop()
