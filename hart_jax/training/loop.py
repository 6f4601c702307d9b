"""The training loop: the same for the tokenizer and the transformer, bit for bit the same when resumed."""

import io
import signal
import sys
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from hart_jax.checkpoints.orbax import CHECKPOINT_DIR, Checkpoints, check_workdir
from hart_jax.checkpoints.restoring import first_line
from hart_jax.config import TrainConfig, experiment_from
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.batches import Batches
from hart_jax.io.run_info import append_manifest
from hart_jax.nn.flop_counter import StepFlops
from hart_jax.parallel.agree import gather_texts
from hart_jax.parallel.mesh import MeshLayout, gather_to_host, make_global_batch
from hart_jax.parallel.stop import StopSignals
from hart_jax.training.buckets import bucket_digests, told
from hart_jax.training.inputs import INPUTS_FILE, check_inputs, data_digests, keep_inputs
from hart_jax.training.metrics import METRICS_FILE, SAMPLES_DIR, MetricsWriter, Progress
from hart_jax.training.metrics_buffer import MetricsBuffer
from hart_jax.training.timings import Profile, Stopwatch

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
    "train.remat",
    "train.attention",
    "train.unroll",
    "data.workers",
    "data.cache",
    "data.max_bad_records",
    "data.stage_gib",
    # Of a tokenizer's run, only what its grids show.
    "data.test",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.slices",
    "mesh.rules",
    # How grids are sampled, and with what; the model that `sample.py` samples from.
    "sample.*",
    "sample_prompts",
    "model",
    # Read by a new run alone.
    "init_from",
)


class Task(Protocol):
    """What is trained.

    `load_pretrained` reads what a new run starts from, before anything is written; `init_state` gives its state,
    `abstract_state` that state's shapes; `shardings` says where each of its arrays lies (`NamedSharding`). `step` does
    step number `step` (from 1) with this process's rows of a batch, and returns before the device is done; among its
    metrics are `loss`, `skipped_steps`, 1 if it changed nothing as something was not finite, else 0, and, as plain
    numbers that no device computes, `model_flops` and `hardware_flops` (`hart_jax.nn.flop_counter.StepFlops`).

    `buckets` are those of the data, None where all images have one shape; `programs` says how many steps are compiled
    at most. `sample_grids` gives `grids` grids by their names: one of each bucket in each list of scales.
    """

    shardings: Any

    @property
    def buckets(self) -> AspectBuckets | None: ...

    @property
    def programs(self) -> int: ...

    @property
    def grids(self) -> int: ...

    def abstract_state(self) -> Any: ...

    def batches(self) -> Batches: ...

    def load_pretrained(self) -> None: ...

    def init_state(self) -> Any: ...

    def step(self, state: Any, batch: Batch, step: int) -> tuple[Any, dict[str, jax.Array]]: ...

    def sample_grids(self, state: Any) -> dict[str, np.ndarray]: ...


def run(task: Task, layout: MeshLayout, train: TrainConfig, config: dict[str, Any], workdir: Path) -> None:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` if there is one, on all devices.

    Args:
      layout: of the batches.
      config: the whole experiment as plain values; a workdir of another experiment is an error.

    Raises:
      UserError: the workdir, its data or its checkpoints are not those of this run, or too many steps are skipped.
      SystemExit: a SIGTERM ended the run, after it was saved; the code is 143. Ctrl-C is a `KeyboardInterrupt`.
    """
    # Before `batches`, which may fill the workdir with text embeddings.
    defaults = experiment_from({"transformer": {}} if "transformer" in config else {}).to_dict()
    may_change = MAY_CHANGE + (("data.train", "data.sources") if (workdir / INPUTS_FILE).exists() else ())
    resumed = check_workdir(workdir, config, may_change, defaults)
    # Before anything is written: a bucket may have too few images.
    buckets = task.buckets
    digests = data_digests(config["data"]) | bucket_digests(buckets)
    if resumed:
        check_inputs(workdir, digests)
    else:
        task.load_pretrained()
    # One process writes; checkpoints are written by all.
    main = jax.process_index() == 0
    if main and (buckets or task.grids > 1):
        print(told(buckets, task.programs), flush=True)
    batches = task.batches()
    with Checkpoints(
        workdir,
        config,
        train.keep_checkpoints,
        may_change,
        train.keep_every,
        train.keep_best,
        defaults,
    ) as checkpoints:
        restored = checkpoints.restore(_abstract(task), batches)
        first, state, log = restored if restored else (0, task.init_state(), None)
        if main:
            print(f"{workdir}: {'resuming at' if first else 'starting at'} step {first} of {train.steps}", flush=True)
            if first < train.steps:
                print("compiling; the first step takes longer than others", flush=True)
        append_manifest(workdir, first, train.steps)
        keep_inputs(workdir, digests)
        resumed_step = first if restored else None
        buffer, stopwatch = MetricsBuffer(train.max_skipped, log), Stopwatch(train.batch_size)
        grids = _Grids(task)

        def due(every: int, step: int) -> bool:
            return bool(every) and (step % every == 0 or step == train.steps)

        with (
            MetricsWriter(workdir, resumed_step, main, train.log_records) as writer,
            Progress(train.steps, first, None if main else io.StringIO()) as progress,
            Profile(workdir, train.profile_steps) as profile,
            StopSignals() as stop,
        ):
            # The run may have ended between a checkpoint and its grid.
            sampled = restored and due(train.sample_every, first)
            if sampled and _said_by_first(main and not writer.has_images(first, task.grids)):
                grids.write(writer, state, first)
            for step in range(first + 1, train.steps + 1):
                profile.before(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    with stopwatch.waiting("data"):
                        batch = next(batches)
                    state, metrics = task.step(state, batch, step)
                    if step < train.steps:
                        # Before anything waits for this step, so that what a batch needs of the device is under way.
                        with stopwatch.waiting("data"):
                            batches.look_ahead()
                profile.after(step, metrics)
                if train.log_records:
                    index = make_global_batch(layout.batch, batch["index"], train.batch_size)
                    bucket = buckets.names[batch["bucket"]] if buckets else ""
                    writer.records(step, gather_to_host(index), bucket)
                buffer.add(step, metrics)
                stopwatch.step()
                last = step == train.steps
                stopping = stop.due(step)
                values = None
                if due(train.log_every, step):
                    values = buffer.close()
                    writer.scalars(step, values)
                    progress.update(step, values["loss"], stopwatch.images)
                    flops = StepFlops(values["model_flops"], values["hardware_flops"])
                    writer.timings(step, {**stopwatch.read(flops), "bad_records": _bad_records(batches)})
                # Before the grid, which may fail.
                if due(train.save_every, step) or stopping:
                    writer.flush()
                    unlogged = buffer.stored()
                    with stopwatch.waiting("checkpoint"):
                        checkpoints.save(step, state, batches, unlogged, values)
                if due(train.sample_every, step) and (last or not stopping):
                    progress.note(f"step {step}: sampling a grid of images")
                    with stopwatch.waiting("pictures"):
                        grids.write(writer, state, step)
                if stopping and not last:
                    checkpoints.wait()
                    _stop(stop.received, f"{workdir}: saved step {step}; the same command resumes there")
    if main:
        print(f"{workdir}: done; {CHECKPOINT_DIR}/, {METRICS_FILE} and {SAMPLES_DIR}/ are there", flush=True)


def _abstract(task: Task) -> Any:
    """The state's shapes with where each array lies."""
    shapes = task.abstract_state()
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, task.shardings)


def _bad_records(batches: Batches) -> int:
    """How many different records have been replaced since this start, in the batches of all processes."""
    found = np.array(batches.bad_records.numbers, np.int32)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(found)))))
    padded = np.pad(found, (0, most - len(found)), constant_values=-1)
    return len(set(np.ravel(multihost_utils.process_allgather(padded)).tolist()) - {-1})


class _Grids:
    """The task's sample grids. One that fails costs a warning, and the run goes on; each reason is said once."""

    def __init__(self, task: Task):
        self._task = task
        self._said: set[str] = set()

    def write(self, writer: MetricsWriter, state: Any, step: int) -> None:
        try:
            for name, image in self._task.sample_grids(state).items():
                writer.image(step, name, image)
        except Exception as error:  # out of memory, a full disk, a prompt that no encoder takes, ...
            reason = f"{type(error).__name__}: {first_line(error)}"
            if reason not in self._said:
                self._said.add(reason)
                print(f"warning: step {step}: no sample grid ({reason}); training goes on", file=sys.stderr, flush=True)


def _said_by_first(value: bool) -> bool:
    """The first process's value, in every process."""
    return gather_texts("yes" if value else "")[0] == "yes"


def _stop(received: signal.Signals | None, message: str) -> None:
    """Ends the program: what was saved is not the end of the run, so that a scheduler starts it again."""
    if received == signal.SIGINT:
        raise KeyboardInterrupt(message)
    print(message, flush=True)
    raise SystemExit(128 + signal.SIGTERM)
