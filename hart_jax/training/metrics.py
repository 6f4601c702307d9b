"""What a training run writes down: numbers, images, timings, and a progress bar.

A workdir gets

    metrics.jsonl     one JSON object per logged step, null for what is not finite; nothing in it depends on the clock,
                      so that an interrupted and resumed run ends with the same bytes as an undisturbed one
    timings.jsonl     speeds and durations, by step
    records.jsonl     which images every step took, if asked for; like metrics.jsonl
    samples/          PNG images, <name>_<step>.png
    tensorboard/      the same scalars and images for TensorBoard
"""

import collections
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from hart_jax.errors import UserError
from hart_jax.io.files import atomic_file
from hart_jax.io.images import save_png
from hart_jax.io.local_side import LocalSide
from hart_jax.io.paths import as_path

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"
RECORDS_FILE = "records.jsonl"
SAMPLES_DIR = "samples"


class MetricsWriter:
    """Writes metrics of one run; safe to kill at any moment.

    A resumed run forgets what was logged after the checkpoint it continues from. For that the loop must log step N
    before it saves checkpoint N, and a step of work N before anything of step N + 1.

    Args:
      workdir: directory of the run; created where it does not exist.
      resumed_step: step of the restored checkpoint; later lines are dropped. None (a fresh start) drops every line.
      active: False on all processes but one: every method then does nothing.
      records: whether `records` is going to be called.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resumed_step: int | None = None,
        active: bool = True,
        records: bool = False,
    ):
        self._active = active
        if not active:
            return
        self._side = LocalSide(workdir, "logs")
        self._workdir = self._side.folder
        if resumed_step is not None:
            self._side.fetch((METRICS_FILE, TIMINGS_FILE, RECORDS_FILE))
        self._metrics = _open_after(self._workdir / METRICS_FILE, resumed_step)
        self._timings = _open_after(self._workdir / TIMINGS_FILE, resumed_step)
        self._files = [self._metrics, self._timings]
        if records:
            self._records = _open_after(self._workdir / RECORDS_FILE, resumed_step)
            self._files.append(self._records)
        purge_step = 0 if resumed_step is None else resumed_step + 1
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        """Logs scalars of a finished step; float32 values are kept to the last bit."""
        if not self._active:
            return
        plain = {name: float(value) for name, value in values.items()}
        _write_line(self._metrics, {"step": step, **plain})
        self._to_tensorboard(step, plain)

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Logs what differs from run to run (images/s, seconds); shown in TensorBoard as well."""
        if not self._active:
            return
        plain = {name: float(value) for name, value in values.items()}
        _write_line(self._timings, {"step": step, **plain})
        self._to_tensorboard(step, plain)

    def records(self, step: int, indices: Sequence[int], bucket: str = "") -> None:
        """Logs which images a step took, by their place in the shards, and the name of their bucket, if it has one."""
        if self._active:
            named = {"bucket": bucket} if bucket else {}
            _write_line(self._records, {"step": step, **named, "index": [int(index) for index in indices]})

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Writes a uint8 image to samples/<name>_<step>.png; a resumed run replaces its own earlier image."""
        if not self._active:
            return
        save_png(self._workdir / SAMPLES_DIR / f"{name}_{step:08d}.png", image_HWC, overwrite=True)
        self._tensorboard.add_image(name, image_HWC, step, dataformats="HWC")

    def has_images(self, step: int, count: int) -> bool:
        """Whether there are so many images of this step."""
        folders = {self._workdir / SAMPLES_DIR, self._side.workdir / SAMPLES_DIR}
        return len({path.name for folder in folders for path in folder.glob(f"*_{step:08d}.png")}) >= count

    def flush(self) -> None:
        """Returns when every line is on disk, also against loss of power, or in the bucket.

        Call it before saving a checkpoint.
        """
        if not self._active:
            return
        for file in self._files:
            os.fsync(file.fileno())
        self._tensorboard.flush()
        self._side.push()

    def close(self) -> None:
        if not self._active:
            return
        self.flush()
        for file in self._files:
            file.close()
        self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _to_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)


class Progress:
    """A progress bar on a terminal, a line every `every_seconds` elsewhere (log files, notebooks, batch systems).

    Args:
      total: number of steps of the whole run.
      initial: steps that are done already.
      stream: where to write; standard error by default.
      every_seconds: time between lines where `stream` is not a terminal.
    """

    _WINDOW = 50

    def __init__(self, total: int, initial: int = 0, stream: TextIO | None = None, every_seconds: float = 30.0):
        self._stream = stream or sys.stderr
        self._total, self._every_seconds = total, every_seconds
        self._history: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=self._WINDOW)
        self._images = 0
        self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=initial, file=self._stream, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, images: int) -> None:
        """Shows a finished step; `images` is how many images were trained on since the last call."""
        self._images += images
        self._history.append((time.monotonic(), step, self._images))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}{self._rate_told()}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line >= self._every_seconds or step == self._total:
            self._last_line = time.monotonic()
            left = f", {_duration(self.seconds_left)} left" if len(self._history) > 1 else ""
            self._print(f"step {step}/{self._total}, loss {loss:.4f}{self._rate_told()}{left}")

    def note(self, text: str) -> None:
        """Says what is being done, where that takes long."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    @property
    def images_per_second(self) -> float:
        """Mean over the last 50 updates, without the first one, which compiles; 0 before there are two."""
        return self._rate(2)

    @property
    def seconds_left(self) -> float:
        """Estimate from the same updates; infinite before there are two."""
        steps_per_second = self._rate(1)
        if not steps_per_second:
            return float("inf")
        return (self._total - self._history[-1][1]) / steps_per_second

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _rate_told(self) -> str:
        """Nothing before there is one."""
        return f", {self.images_per_second:.1f} images/s" if len(self._history) > 1 else ""

    def _rate(self, column: int) -> float:
        if len(self._history) < 2:
            return 0.0
        first, last = self._history[0], self._history[-1]
        return (last[column] - first[column]) / max(last[0] - first[0], 1e-9)


def read_metrics(workdir: str | os.PathLike, file: str = METRICS_FILE) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, oldest first; an unfinished last line is left out.

    What was not finite is NaN.

    Raises:
      UserError: a line is damaged.
    """
    lines = [values for values, _ in _whole_lines(as_path(workdir) / file)]
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


def _whole_lines(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """What each line says, and its bytes."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [(_values(line, path, number), line + b"\n") for number, line in enumerate(lines, 1)]


def _values(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise ValueError("it says no step")
        return values
    except ValueError as error:
        raise UserError(f"{path}: line {number} is damaged ({error}); remove that line") from None


def _open_after(path: Path, resumed_step: int | None):
    """Opens a file for appending after the last line of step `resumed_step` or earlier."""
    kept = []
    if resumed_step is not None:
        kept = [line for values, line in _whole_lines(path) if values["step"] <= resumed_step]
    with atomic_file(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return open(path, "ab", buffering=0)  # stays open for the whole run; unbuffered, a line is one write


def _write_line(file, record: Mapping[str, Any]) -> None:
    plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
    file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
