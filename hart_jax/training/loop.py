"""The training loop: the same for the tokenizer and the transformer, bit for bit the same when resumed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from hart_jax.checkpoint import Checkpoints, check_workdir
from hart_jax.config import TrainConfig
from hart_jax.parallel.mesh import data_mesh, replicated, split_batch
from hart_jax.training.metrics import MetricsWriter, Progress

Batch = dict[str, np.ndarray]

# Settings that a rerun may change without being another experiment.
MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
    "train.keep_checkpoints",
    "data.workers",
    "data.cache",
)


class Task(Protocol):
    """What is trained. `step` does step number `step` (from 1); it returns before the device is done."""

    def batches(self) -> Iterator[Batch]: ...

    def init(self) -> Any: ...

    def step(self, state: Any, batch: Batch, step: int) -> tuple[Any, dict[str, jax.Array]]: ...

    def pictures(self, state: Any) -> dict[str, np.ndarray]: ...


def run(task: Task, train: TrainConfig, config: dict[str, Any], workdir: Path) -> None:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` if there is one, on all devices.

    Args:
      config: the whole experiment as plain values; a workdir of another experiment is an error.
    """
    mesh = data_mesh(train.batch_size)
    everywhere = replicated(mesh)
    # Before `batches`, which may fill the workdir with text states.
    check_workdir(workdir, config, MAY_CHANGE)
    batches = task.batches()
    with Checkpoints(workdir, config, train.keep_checkpoints, train.save_every, MAY_CHANGE) as checkpoints:
        init = jax.jit(task.init, out_shardings=everywhere)
        restored = checkpoints.restore(init.eval_shape(), batches)
        first, state = restored if restored else (0, init())
        print(f"{workdir}: {'resuming at' if first else 'starting at'} step {first} of {train.steps}", flush=True)
        resumed_step = first if restored else None
        with MetricsWriter(workdir, resumed_step) as writer, Progress(train.steps, first) as progress:
            window, since = [], time.monotonic()
            for step in range(first + 1, train.steps + 1):
                state, metrics = task.step(state, split_batch(mesh, next(batches)), step)
                window.append(metrics)
                last = step == train.steps
                if step % train.log_every == 0 or last:
                    values = _means(window)
                    writer.scalars(step, values)
                    images = len(window) * train.batch_size
                    now = time.monotonic()
                    writer.timings(step, {"images_per_second": images / (now - since)})
                    progress.update(step, values["loss"], images)
                    window, since = [], now
                if step % train.sample_every == 0 or last:
                    for name, picture in task.pictures(state).items():
                        writer.image(step, name, picture)
                if step % train.save_every == 0 or last:
                    writer.flush()
                    checkpoints.save(step, state, batches, force=last)


def _means(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over a window of steps, each name over the steps that have it."""
    values: dict[str, list[float]] = {}
    for metrics in jax.device_get(window):
        for name, value in metrics.items():
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(column)) for name, column in values.items()}
