"""A pod's training in miniature, from the first step to a scored model: `python -m tests.rehearse_pod`.

The 0.7B recipe (`configs/hart_0p7b_256.py`) at tiny sizes, as the hosts of a pod run it: two processes of four fake
devices each, parameters split over `fsdp` and `tensor`, captions encoded on the fly by a Qwen2 with a system prompt,
sample grids, a profile, checkpoints of which the best stays; shards, workdir, model and results in a bucket, which an
emulator on loopback serves to the real clients. The run gets SIGTERM, then one host is lost (SIGKILL), and it ends on
another mesh. Its model is exported, samples an image and is scored. After every stage what must hold is checked; a
failure prints the end of the logs of the processes. `--local` keeps everything on the disk instead.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hart_jax.checkpoints.model_folder import write_part
from hart_jax.checkpoints.orbax import CHECKPOINT_DIR
from hart_jax.io.buckets import upload_folder
from hart_jax.io.paths import as_path, is_remote
from hart_jax.io.run_info import RUNS_FILE
from hart_jax.training.metrics import METRICS_FILE, RECORDS_FILE, SAMPLES_DIR, TIMINGS_FILE
from hart_jax.training.timings import PROFILE_DIR
from tests import tiny_qwen2
from tests.bucket import BUCKET, emulated_bucket
from tests.evaluation.networks.test_clip import write_published as write_clip
from tests.tiny import TOKENIZER, tiny_model
from tests.train_runs import ROOT, loopback_job, make_shards, quick_environment

STEPS, BATCH, IMAGES, SAVE_EVERY, SAMPLE_EVERY = 30, 8, 24, 5, 10
PROFILED = (2, 3)
SCORED = 6
# Of one stage, on a machine that does much else; and what a process may take to notice that another is gone.
LIMIT_SECONDS, GRACE_SECONDS = 600, 5
# Lines of every log that a failure shows.
TAIL = 40
# Steps of the same place in the data on another mesh, or before and after a restart.
SAME_LOSS = 1e-4
# How a run ends that SIGTERM asked to.
STOPPED = 143

# Two heads of keys, as the published one has, so that a mesh's `tensor` axis can split them.
QWEN2 = tiny_qwen2.Case(
    tiny_qwen2.CASES["untied vision, pads left, system prompt"].config | {"num_key_value_heads": 2},
    pads="left",
    system_prompt=tiny_qwen2.SYSTEM_PROMPT,
)
CONFIG = """
import runpy


def get_config():
    config = runpy.run_path({recipe!r})["get_config"]()
    config.update({changes!r})
    return config
"""


@dataclasses.dataclass
class Job:
    """Processes that run one command, and what they print, a file each."""

    processes: list[subprocess.Popen]
    logs: list[Path]

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    @property
    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def text(self) -> str:
        return "".join(log.read_text(errors="replace") for log in self.logs)

    def wait(self, seconds: float = LIMIT_SECONDS) -> None:
        """Until all have ended; those that have not by then are killed."""
        until = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.01))
        self.kill()

    def wait_for(self, due: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        while not due():
            check(not any(code is not None for code in self.codes), f"a process ended ({self.codes}) before {what}")
            check(time.monotonic() < until, f"{LIMIT_SECONDS} s went by before {what}")
            time.sleep(0.05)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


class Failure(Exception):
    """What must hold does not."""


def check(ok: bool, message: str) -> None:
    if not ok:
        raise Failure(message)


class Rehearsal:
    """One rehearsal in an empty `folder`; what a pod keeps in a bucket is below `store`."""

    def __init__(self, folder: Path, store: Any):
        self.folder, self.store, self.workdir = folder, store, store / "run"
        self.jobs: list[Job] = []
        self.began = time.monotonic()
        # The log as it was at the last stop.
        self.logged: list[dict[str, Any]] = []

    def say(self, stage: str, found: str) -> None:
        print(f"[{time.monotonic() - self.began:5.1f} s] {stage}: {found}", flush=True)

    def start(self, *command: str, processes: int = 1, devices: int = 1) -> Job:
        job = Job([], [])
        # Known before it is whole, so that whatever happens nothing is left running.
        self.jobs.append(job)
        for meeting in loopback_job(processes):
            log = self.folder / f"{len(self.jobs):02d}-{Path(command[0]).name}-{len(job.logs)}.log"
            job.logs.append(log)
            with open(log, "wb") as file:
                # Every host has a disk of its own.
                cache = {"HART_CACHE_DIR": str(self.folder / f"cache-{len(job.logs)}")}
                environment = {**quick_environment(devices), **cache, **meeting}
                line = [sys.executable, *command]
                started = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            job.processes.append(started)
        return job

    def run(self, *command: str) -> str:
        """What a command prints that ends with 0."""
        job = self.start(*command)
        job.wait()
        check(job.codes == [0], f"{' '.join(command)} ended with {job.codes[0]}")
        return job.text()

    def train(self, processes: int, devices: int, **mesh: int) -> Job:
        sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        command = ("train.py", f"--config={self.config}", f"--workdir={self.workdir}", *sizes)
        return self.start(*command, processes=processes, devices=devices)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of one of the workdir's files."""
        path = self.workdir / name
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints; in a bucket, Orbax writes last that one is."""
        folder = self.workdir / CHECKPOINT_DIR
        steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
        if is_remote(folder):
            steps = [path for path in steps if (path / "commit_success.txt").exists()]
        return sorted(int(path.name) for path in steps)

    # Stages.

    def prepare(self) -> None:
        """Inputs: shards with captions, a tokenizer, a text encoder with a system prompt, a feature network."""
        model, inputs = tiny_model(context_tokens=6, context_dim=24), self.folder / "inputs"
        write_part(inputs / "tokenizer", model.tokenizer_config, model.tokenizer)
        tiny_qwen2.write_folder(inputs / "qwen2", QWEN2)
        (inputs / "system_prompt.md").write_text(tiny_qwen2.SYSTEM_PROMPT)
        write_clip(inputs / "clip-vit")
        sizes = {"train": IMAGES, "test": 8}
        train, test = (self.store_shards(name, count) for name, count in sizes.items())
        changes = {
            "tokenizer": {**TOKENIZER.to_dict(), "patch_nums": TOKENIZER.patch_nums, "channel_multipliers": (1, 1)},
            "transformer": {**model.transformer_config.to_dict(), "patch_nums": TOKENIZER.patch_nums},
            "tokenizer_from": str(inputs / "tokenizer"),
            "text_encoder": str(inputs / "qwen2"),
            "system_prompt": str(inputs / "system_prompt.md"),
            "loss": {"condition_top_k": 8, "min_kept": 4, "keep_counts": 2},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 4},
            "mesh": {"fsdp": 2},
            "data": {"train": train, "test": test},
            "train": {
                "steps": STEPS,
                "batch_size": BATCH,
                "log_every": 1,
                "save_every": SAVE_EVERY,
                "sample_every": SAMPLE_EVERY,
                "keep_best": "loss",
                "profile_steps": PROFILED,
                "log_records": True,
            },
            "sample": {"top_k": 8, "top_k_late": 8},
        }
        self.config = inputs / "recipe.py"
        recipe = str(ROOT / "configs" / "hart_0p7b_256.py")
        self.config.write_text(CONFIG.format(recipe=recipe, changes=changes))
        self.say("prepared", f"{IMAGES} images with captions, tokenizer, text encoder; all in {self.store}")

    def store_shards(self, name: str, count: int) -> str:
        local = make_shards(self.folder / "inputs" / name, count, seed=count)
        if not is_remote(self.store):
            return str(local)
        upload_folder(local, self.store / "data" / name)
        return str(self.store / "data" / name)

    def preempted(self) -> None:
        """SIGTERM to one process: both end after the same step, which is saved."""
        job = self.train(2, 4, tensor=2)
        job.wait_for(lambda: bool(self.checkpoints()), "the first checkpoint")
        job.processes[1].send_signal(signal.SIGTERM)
        job.wait()
        check(job.codes == [STOPPED, STOPPED], f"SIGTERM: the processes ended with {job.codes}, not {STOPPED}")
        last = self.checkpoints()[-1]
        check(SAVE_EVERY <= last < STEPS, f"SIGTERM: step {last} of {STEPS} was saved last")
        check(f"saved step {last}" in job.text(), f"SIGTERM: nothing says that step {last} is saved")
        self.check_log(last)
        profile = [path for path in walk(self.workdir / PROFILE_DIR) if path.name.endswith(".xplane.pb")]
        check(bool(profile), f"no trace of steps {PROFILED} in {self.workdir / PROFILE_DIR}")
        self.say("SIGTERM", f"2 x 4 devices, fsdp=2 tensor=2; both ended with {STOPPED}, step {last} saved")

    def lost(self) -> None:
        """SIGKILL to one process some steps later: the other cannot go on."""
        first = self.checkpoints()[-1]
        job = self.train(2, 4, tensor=2)
        job.wait_for(lambda: self.checkpoints()[-1] > first, f"a checkpoint after step {first}")
        job.processes[1].kill()
        job.wait(GRACE_SECONDS)
        check(0 not in job.codes, f"SIGKILL: a process ended with 0 while the other was lost: {job.codes}")
        check(f"resuming at step {first}" in job.text(), f"SIGKILL: the run did not go on from step {first}")
        last = self.checkpoints()[-1]
        check(last < STEPS, "SIGKILL: the run was at its end before")
        self.check_log(last, at_least=True)
        self.say("SIGKILL", f"went on from step {first}; one process lost, codes {job.codes}, step {last} is saved")

    def ended(self) -> None:
        """The rest in one process on another mesh."""
        first = self.checkpoints()[-1]
        job = self.train(1, 4, fsdp=4)
        job.wait()
        check(job.codes == [0], f"the last start ended with {job.codes[0]}")
        check(f"resuming at step {first}" in job.text(), f"the run did not go on from step {first}")
        self.check_log(STEPS)
        self.check_records()
        self.check_workdir()
        self.say("another mesh", f"1 x 4 devices, fsdp=4; from step {first} to {STEPS}; log, grids, checkpoints hold")

    def used(self) -> None:
        """The model as a folder, one image, a row of scores."""
        model, image, scores = self.store / "model", self.store / "drawn.png", self.store / "scores"
        self.run("-m", "hart_jax.checkpoints.export", f"--workdir={self.workdir}", f"--out={model}")
        self.run(
            "sample.py", f"--config={self.config}", f"--checkpoint={model}", "--prompt=a red apple", f"--out={image}"
        )
        check_image(image, TOKENIZER.image_size)
        self.run(
            "evaluate.py",
            "--what=generation",
            f"--config={self.config}",
            f"--checkpoint={model}",
            f"--clip={self.folder / 'inputs' / 'clip-vit'}",
            f"--count={SCORED}",
            f"--out={scores}",
        )
        found = json.loads((scores / "results.json").read_text())
        (clip,) = (values for name, values in found["scores"].items() if name.startswith("CLIP"))
        check(0 <= clip["clip_score"] <= 100, f"a CLIP score of {clip['clip_score']}")
        check("CLIP score" in (scores / "results.md").read_text(), "evaluate.py wrote no row")
        self.say("used", f"exported, an image sampled, {SCORED} images scored: CLIP score {clip['clip_score']:.2f}")

    # What must hold.

    def check_log(self, last: int, at_least: bool = False) -> None:
        """All steps in order, with finite losses; those of before are as they were, up to rounding where done again."""
        lines = self.lines(METRICS_FILE)
        steps = [line["step"] for line in lines]
        whole = steps == list(range(1, len(steps) + 1)) and (len(steps) >= last if at_least else len(steps) == last)
        check(whole, f"the log has steps {steps}, not 1 to {last}")
        for line in lines:
            check(math.isfinite(line["loss"]) and line["loss"] > 0, f"the loss of step {line['step']}: {line['loss']}")
        for before, now in zip(self.logged, lines, strict=False):
            close = math.isclose(before["loss"], now["loss"], rel_tol=SAME_LOSS)
            check(close, f"step {now['step']} had a loss of {before['loss']}, done again {now['loss']}")
        self.logged = lines

    def check_records(self) -> None:
        """Every epoch takes every image once, over all starts."""
        taken = [index for line in self.lines(RECORDS_FILE) for index in line["index"]]
        check(len(taken) == STEPS * BATCH, f"{len(taken)} images were taken, not {STEPS * BATCH}")
        for first in range(0, len(taken), IMAGES):
            epoch = sorted(taken[first : first + IMAGES])
            check(epoch == list(range(IMAGES))[: len(epoch)] or len(epoch) < IMAGES, f"an epoch took {epoch}")

    def check_workdir(self) -> None:
        grids = sorted(path.name for path in (self.workdir / SAMPLES_DIR).iterdir())
        expected = [f"samples_{step:08d}.png" for step in range(SAMPLE_EVERY, STEPS + 1, SAMPLE_EVERY)]
        check(grids == expected, f"sample grids: {grids}, not {expected}")
        for name in grids:
            check_image(self.workdir / SAMPLES_DIR / name)
        kept, latest = self.checkpoints(), [STEPS - SAVE_EVERY, STEPS]
        loss = {line["step"]: line["loss"] for line in self.logged}
        check(set(latest) <= set(kept), f"checkpoints of steps {kept}, without {latest}")
        best = min((step for step in loss if step % SAVE_EVERY == 0), key=loss.__getitem__)
        check(len(kept) <= 3 and min(map(loss.__getitem__, kept)) <= loss[best], f"checkpoints {kept}, best is {best}")
        runs = [(run["processes"], run["devices"], run["step"]) for run in self.lines(RUNS_FILE)]
        check([run[:2] for run in runs] == [(2, 8), (2, 8), (1, 4)], f"the manifest has starts {runs}")
        check(runs[0][2] == 0 < runs[1][2] < runs[2][2], f"the manifest has starts {runs}")
        timings = self.lines(TIMINGS_FILE)
        check(all(line["images_per_second"] > 0 for line in timings), "timings.jsonl has a speed of 0")
        check(len(timings) == STEPS, f"timings.jsonl has {len(timings)} lines, not {STEPS}")


def walk(folder: Any) -> Iterator[Any]:
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir():
            yield from walk(path)
        else:
            yield path


def check_image(path: Any, side: int | None = None) -> None:
    check(path.exists(), f"{path} is not there")
    with path.open("rb") as file:
        pixels = np.asarray(Image.open(file).convert("RGB"))
    check(side is None or pixels.shape == (side, side, 3), f"{path} is {pixels.shape}")
    check(int(pixels.max()) > int(pixels.min()), f"{path} is blank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", action="store_true", help="On the disk, without a bucket.")
    local = parser.parse_args().local
    with tempfile.TemporaryDirectory() as name, contextlib.nullcontext() if local else emulated_bucket():
        rehearsal = Rehearsal(Path(name), Path(name) / "store" if local else as_path(f"{BUCKET}/rehearsal"))
        try:
            for stage in ("prepare", "preempted", "lost", "ended", "used"):
                getattr(rehearsal, stage)()
        except Failure as failure:
            for log in rehearsal.jobs[-1].logs if rehearsal.jobs else []:
                print(f"== the end of {log.name}", *log.read_text(errors="replace").splitlines()[-TAIL:], sep="\n")
            sys.exit(f"error: the rehearsal failed at {stage}: {failure}")
        finally:
            for job in rehearsal.jobs:
                job.kill()
        seconds = time.monotonic() - rehearsal.began
    print(f"the rehearsal passed in {seconds:.0f} s: SIGTERM, SIGKILL, another mesh, export, an image, a row of scores")


if __name__ == "__main__":
    main()
