"""A training killed with SIGKILL at random moments, and rerun until it ends, against one that nobody disturbed.

    python -m tests.kill_and_resume --experiment hart --processes 2 --kills 20 --seed 0

prints every kill and what it fell on, and fails unless log, records, images, parameters and averages of both runs
are equal to the last bit.
"""

import argparse
import collections
import dataclasses
import functools
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from hart_jax.checkpoints.orbax import CHECKPOINT_DIR, load_params
from hart_jax.training.metrics import METRICS_FILE, RECORDS_FILE, SAMPLES_DIR, read_metrics
from tests.train_runs import (
    BUCKETS,
    logged_steps,
    outcome,
    run_to_end,
    start_job,
    write_hart_config,
    write_tokenizer_config,
)

# What writes a config file, and the fields of its state to compare.
EXPERIMENTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "tokenizer": (write_tokenizer_config, ("model.params", "model.ema", "code_usage_V")),
    "hart": (write_hart_config, ("params", "ema")),
    "buckets": (functools.partial(write_hart_config, ahead=True, buckets=BUCKETS), ("params", "ema")),
}
# A step is a few milliseconds, a save some hundred: so often that a good part of the kills falls into one.
SAVE_EVERY = 8
# How long processes may take to notice that another one is gone.
GRACE_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Kill:
    """`phase`: "starting", "training" or "saving"; `victim`: "all", or the number of the one process."""

    step: int
    phase: str
    victim: str
    others: str


def unfinished_saves(workdir: Path) -> list[str]:
    folder = workdir / CHECKPOINT_DIR
    return [path.name for path in folder.iterdir() if not path.name.isdigit()] if folder.is_dir() else []


def kill_at_random(job: list[subprocess.Popen], workdir: Path, furthest: int, rng: random.Random) -> Kill | None:
    """Kills a job while it starts (1 in 5), or after up to `furthest` more steps; None if it has ended before."""
    step = logged_steps(workdir)
    while_starting, delay = rng.random() < 0.2, rng.random()
    target = step + rng.randint(1, furthest)
    victim = rng.choice(["all", *map(str, range(len(job)))]) if len(job) > 1 else "all"
    began = time.monotonic()
    resumed = False
    while True:
        now = logged_steps(workdir)
        # A log that is cut back to the checkpoint tells that training is about to go on.
        resumed = resumed or now != step
        if while_starting and (resumed or time.monotonic() - began > 20 * delay):
            break
        if now >= target:
            time.sleep(delay / 10)
            break
        if any(process.poll() is not None for process in job):
            code, _, err = outcome(job)
            assert code == 0, err
            return None
        time.sleep(0.001)
    for number, process in enumerate(job):
        if victim in ("all", str(number)):
            process.kill()
    # What unfinished saves there were before, a start removes.
    phase = "starting" if not resumed else "saving" if unfinished_saves(workdir) else "training"
    step, others = logged_steps(workdir), ""
    if victim != "all":
        others = survivors_end(job)
    outcome(job)
    return Kill(step, phase, victim, others)


def survivors_end(job: list[subprocess.Popen]) -> str:
    """Whether the other processes of a job end by themselves; afterwards they have ended."""
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until:
        if all(process.poll() is not None for process in job):
            return "ended by themselves"
        time.sleep(0.05)
    for process in job:
        process.kill()
    return f"killed after {GRACE_SECONDS} s"


def assert_same_run(killed: Path, whole: Path, fields: tuple[str, ...], grids: bool = True) -> None:
    """Both have the same log, records, `fields` of the state and, with `grids`, images, of which there are some."""
    for file in (METRICS_FILE, RECORDS_FILE):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    for field in fields:
        jax.tree.map(np.testing.assert_array_equal, load_params(killed, field), load_params(whole, field))
    if not grids:
        return
    images = sorted(path.name for path in (whole / SAMPLES_DIR).iterdir())
    assert images and images == sorted(path.name for path in (killed / SAMPLES_DIR).iterdir())
    for name in images:
        assert (whole / SAMPLES_DIR / name).read_bytes() == (killed / SAMPLES_DIR / name).read_bytes(), name


def kill_and_resume(
    folder: Path, experiment: str, processes: int, kills: int, seed: int, devices: int = 1
) -> list[Kill]:
    """Runs it all in an empty folder; returns the kills, or raises where something differs."""
    write_config, fields = EXPERIMENTS[experiment]
    config = write_config(folder / "inputs")
    furthest = 2 * SAVE_EVERY
    # Even if every life is as long as it can be, the last is yet to come.
    steps = furthest * (kills + 1)
    settings = (
        f"--config={config}",
        f"--config.train.steps={steps}",
        "--config.train.log_every=1",
        "--config.train.log_records=True",
        f"--config.train.save_every={SAVE_EVERY}",
        f"--config.train.sample_every={steps // 2}",
    )
    run = {"processes": processes, "devices": devices}
    whole, killed = folder / "whole", folder / "killed"
    code, _, err = run_to_end(*settings, f"--workdir={whole}", **run)
    assert code == 0, err
    print(f"{experiment}, {processes} x {devices} devices, {steps} steps, seed {seed}", flush=True)
    rng, done = random.Random(seed), []
    while len(done) < kills:
        kill = kill_at_random(start_job(*settings, f"--workdir={killed}", **run), killed, furthest, rng)
        if kill is None:
            break
        done.append(kill)
        print(f"kill {len(done)}: {kill}", flush=True)
    code, _, err = run_to_end(*settings, f"--workdir={killed}", **run)
    assert code == 0, err
    assert [line["step"] for line in read_metrics(whole)] == list(range(1, steps + 1))
    assert_same_run(killed, whole, fields)
    phases = collections.Counter(kill.phase for kill in done)
    print(f"{len(done)} kills {dict(phases)}: log, records, images and parameters are equal", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", choices=list(EXPERIMENTS), default="hart")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1, help="fake devices of each process")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), **vars(arguments))


if __name__ == "__main__":
    main()
