"""The training loop: the same for the tokenizer and the transformer, bit for bit the same when resumed."""

import io
import signal
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from hart_jax.checkpoint import Checkpoints, check_workdir
from hart_jax.config import TrainConfig
from hart_jax.data.batches import Batches
from hart_jax.experiment import experiment_from
from hart_jax.parallel.mesh import Placement, on_host, to_global
from hart_jax.training.flops import StepFlops
from hart_jax.training.manifest import append_manifest
from hart_jax.training.metrics import MetricsWriter, Progress
from hart_jax.training.stop import StopSignals
from hart_jax.training.timings import Profile, Stopwatch
from hart_jax.training.window import Window

Batch = dict[str, np.ndarray]

# Settings that a rerun may change without being another experiment.
MAY_CHANGE = (
    "train.steps",
    "train.accumulate",
    "train.log_every",
    "train.save_every",
    "train.sample_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.max_skipped",
    "train.profile_steps",
    "train.log_records",
    "data.workers",
    "data.cache",
    "data.max_bad_records",
    "data.stage_gib",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.slices",
    "mesh.rules",
)


class Task(Protocol):
    """What is trained.

    `load_previous` reads what a new run starts from, before anything is written; `start` gives its state, `init` one of
    the same shapes; `places` says where each of its arrays lies (`NamedSharding`). `step` does step number `step` (from
    1) with this process's rows of a batch, and returns before the device is done; among its metrics are `loss`, `flops`
    (of the whole step) and `skipped_steps`, 1 if it changed nothing as something was not finite, else 0.
    """

    places: Any

    def batches(self) -> Batches: ...

    def init(self) -> Any: ...

    def load_previous(self) -> None: ...

    def start(self) -> Any: ...

    def step(self, state: Any, batch: Batch, step: int) -> tuple[Any, dict[str, jax.Array]]: ...

    def pictures(self, state: Any) -> dict[str, np.ndarray]: ...


def run(task: Task, placement: Placement, train: TrainConfig, config: dict[str, Any], workdir: Path) -> None:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` if there is one, on all devices.

    Args:
      placement: of the batches.
      config: the whole experiment as plain values; a workdir of another experiment is an error.
    """
    # Before `batches`, which may fill the workdir with text states.
    defaults = experiment_from({"transformer": {}} if "transformer" in config else {}).to_dict()
    if not check_workdir(workdir, config, MAY_CHANGE, defaults):
        task.load_previous()
    batches = task.batches()
    with Checkpoints(
        workdir,
        config,
        train.keep_checkpoints,
        train.save_every,
        MAY_CHANGE,
        train.keep_every,
        train.keep_best,
        defaults,
    ) as checkpoints:
        restored = checkpoints.restore(_abstract(task), batches)
        first, state, log = restored if restored else (0, task.start(), None)
        # One process writes; checkpoints are written by all.
        main = jax.process_index() == 0
        if main:
            print(f"{workdir}: {'resuming at' if first else 'starting at'} step {first} of {train.steps}", flush=True)
        append_manifest(workdir, first, train.steps)
        resumed_step = first if restored else None
        window, stopwatch = Window(train.max_skipped, log), Stopwatch(train.batch_size)
        with (
            MetricsWriter(workdir, resumed_step, main, train.log_records) as writer,
            Progress(train.steps, first, None if main else io.StringIO()) as progress,
            Profile(workdir, train.profile_steps) as profile,
            StopSignals() as stop,
        ):
            for step in range(first + 1, train.steps + 1):
                profile.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    with stopwatch.waiting("data"):
                        batch = next(batches)
                    state, metrics = task.step(state, batch, step)
                profile.after(step, metrics)
                if train.log_records:
                    index = to_global(placement.batch, batch["index"], train.batch_size)
                    writer.records(step, on_host(index))
                window.add(step, metrics)
                stopwatch.step()
                last = step == train.steps
                stopping = stop.due(step)
                values = None
                if step % train.log_every == 0 or last:
                    values = window.close()
                    writer.scalars(step, values)
                    progress.update(step, values["loss"], stopwatch.images)
                    flops = StepFlops(values["model_flops"], values["hardware_flops"])
                    writer.timings(step, {**stopwatch.read(flops), "bad_records": _bad_records(batches)})
                if train.sample_every and (step % train.sample_every == 0 or last):
                    with stopwatch.waiting("pictures"):
                        for name, picture in task.pictures(state).items():
                            writer.image(step, name, picture)
                if step % train.save_every == 0 or last or stopping:
                    writer.flush()
                    unlogged = window.stored()
                    with stopwatch.waiting("checkpoint"):
                        checkpoints.save(step, state, batches, unlogged, values, force=True)
                if stopping and not last:
                    checkpoints.wait()
                    _stop(stop.received, f"{workdir}: saved step {step}; the same command resumes there")
                    break


def _abstract(task: Task) -> Any:
    """The state's shapes with where each array lies."""
    shapes = jax.eval_shape(task.init)
    return jax.tree.map(lambda leaf, place: leaf.update(sharding=place), shapes, task.places)


def _bad_records(batches: Batches) -> int:
    """How many different records have been replaced since this start, in the batches of all processes."""
    found = np.array(batches.bad_records.numbers, np.int32)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(found)))))
    padded = np.pad(found, (0, most - len(found)), constant_values=-1)
    return len(set(np.ravel(multihost_utils.process_allgather(padded)).tolist()) - {-1})


def _stop(received: signal.Signals | None, message: str) -> None:
    if received == signal.SIGINT:
        raise KeyboardInterrupt(message)
    print(message, flush=True)
