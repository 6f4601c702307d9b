"""Images into a folder, each written once: what a run of `sample.py` keeps so that an interrupted one goes on.

    00000-pictures.jsonl    what makes the run (first line), then name, prompt, seed and index of each of its images,
                            and its size where that is not the model's own
    00000-a-red-apple.png   an image, whole as soon as it has its name
    00000-grid.png          of a run of 2 to 64 images, at its end

Numbers go on after those of other runs in the folder. A run that is resumed samples the batches that lack an image,
each as it was, and writes those that are missing: the same files, to the last bit, as without the interruption.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hart_jax.checkpoints.model_folder import Model
from hart_jax.config import Shape
from hart_jax.config.sizes import size_text
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import check_can_write, remove_unfinished, write_text
from hart_jax.io.fingerprint import content_digest, differences, json_digest, sha256, told, tree_digest
from hart_jax.io.images import grid, is_whole_png, save_png
from hart_jax.io.ownership import owned
from hart_jax.parallel.stop import StopAnyTime
from hart_jax.sampling.pipeline import Pipeline, Sample, SampleRequest
from hart_jax.text.system_prompt import read_system_prompt

MANIFEST = "pictures.jsonl"
LARGEST_GRID = 64
_COLUMNS = 8
_OTHER_FORMATS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclasses.dataclass(frozen=True)
class OutputRun:
    """Where the images of a run go, in the order of the requests, how many are sampled at a time, and their grid."""

    paths: list[Path]
    batch_size: int
    grid: Path | None

    @property
    def done(self) -> int:
        return sum(map(is_whole_png, self.paths))


def is_one_file(out: Path) -> bool:
    """Whether --out names a PNG file, and not a folder."""
    return out.suffix.lower() == ".png" and not out.is_dir()


def owned_out(out: Path) -> contextlib.AbstractContextManager[None]:
    """Within it, the folder or file belongs to this run alone: see `hart_jax.io.ownership.owned`."""
    return owned(out.with_name(f".{out.name}.owner") if is_one_file(out) else out, "a run that samples images")


def check_out(out: Path, count: int, resume: bool) -> None:
    """Raises `UserError`, or `OSError` of the file system, where so many images cannot go; writes nothing."""
    if out.suffix.lower() in _OTHER_FORMATS and not out.is_dir():
        raise UserError(f"--out={out}: images are written as PNG; give a folder, or a name that ends in .png")
    check_can_write(out.parent if is_one_file(out) else out)
    if is_one_file(out):
        if resume:
            raise UserError(f"--out={out}: --resume goes on in a folder, not in one file")
        if count > 1:
            raise UserError(f"--out={out}: {count} images need a folder, not one file")
        if out.exists():
            raise UserError(f"{out}: already exists; remove it or give another --out")
    elif out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is not a folder")


def identity(model: Model, settings: Any, text: tuple[str | Path | None, str | Path | None]) -> dict[str, Any]:
    """What an image depends on beside its prompt, seed and index, as JSON: digests of the models, and the settings."""
    configs = [model.tokenizer_config.to_dict(), model.transformer_config.to_dict()]
    parameters = tree_digest(model.tokenizer, model.transformer)
    about = {"model": json_digest([configs, parameters])[:16], "settings": settings.to_dict()}
    folder, system_prompt = text
    if folder and not model.transformer_config.num_classes:
        files = sorted(path for path in local_copy(folder).iterdir() if path.is_file())
        about["text_encoder"] = json_digest([(path.name, content_digest(path)) for path in files])[:16]
        if system_prompt:
            about["system_prompt"] = sha256(read_system_prompt(system_prompt))[:16]
    return about


def open_run(
    out: Path,
    requests: Sequence[SampleRequest],
    about: Mapping[str, Any],
    batch_size: int,
    size_of: Callable[[int], int],
    resume: bool = False,
) -> OutputRun:
    """The output of a new run or, with `resume`, of the run of just this that the folder holds.

    Args:
      out: a folder, or the name of a .png for one image.
      requests: the images; they and `about` tell runs apart.
      batch_size: images at a time; 0: those of the run that is resumed, else as `size_of(0)` says.
      size_of: of the wanted number, the possible one (`Pipeline.batch_size`).
      resume: goes on with the latest run of this; where the folder has no runs it begins one.

    Raises:
      UserError: see `check_out`; or the folder holds runs, but none of this.
    """
    check_out(out, len(requests), resume)
    if is_one_file(out):
        return OutputRun([out], size_of(batch_size), None)
    manifests = sorted(out.glob(f"[0-9]*-{MANIFEST}"), reverse=True)
    if resume and manifests:
        output_run = _find(manifests, requests, about)
        return dataclasses.replace(output_run, batch_size=size_of(batch_size or output_run.batch_size))
    taken = [int(found[1]) for path in out.glob("*") if (found := re.match(r"(\d{5,})-.*\.png$", path.name))]
    # A run that was interrupted keeps its numbers.
    taken += [int(manifest.name.partition("-")[0]) + len(_read(manifest)[1]) - 1 for manifest in manifests]
    first = max(taken, default=-1) + 1
    names = [f"{first + number:05d}-{_slug(one.prompt)}.png" for number, one in enumerate(requests)]
    size = size_of(batch_size)
    if len(requests) > 1 or resume:
        lines = [{"run": about, "batch_size": size}]
        lines += [{"file": name, **_line(one)} for name, one in zip(names, requests, strict=True)]
        write_text(out / f"{first:05d}-{MANIFEST}", "".join(json.dumps(line) + "\n" for line in lines))
    return _output_run(out, names, size)


def _line(request: SampleRequest) -> dict[str, Any]:
    """As the record of a run has it."""
    size = {} if request.shape is None else {"size": size_text(request.shape)}
    return {"wish": request.prompt, "seed": request.seed, "index": request.index, **size}


def _output_run(out: Path, names: list[str], batch_size: int) -> OutputRun:
    grid = f"{names[0].partition('-')[0]}-grid.png"
    return OutputRun(
        [out / name for name in names],
        batch_size,
        out / grid if 1 < len(names) <= LARGEST_GRID and grid not in names else None,
    )


def _find(manifests: list[Path], requests: Sequence[SampleRequest], about: Mapping[str, Any]) -> OutputRun:
    wanted, own = json.loads(json.dumps(about)), [_line(one) for one in requests]
    for manifest in manifests:
        run, lines = _read(manifest)
        if (run["run"], [{**line, "file": ""} for line in lines]) == (wanted, [{"file": "", **p} for p in own]):
            return _output_run(manifest.parent, [line["file"] for line in lines], run["batch_size"])
    run, lines = _read(manifests[0])
    changed = told(differences(run["run"], wanted)) or "it has other prompts, seeds, sizes or numbers of images"
    raise UserError(
        f"--resume: {manifests[0].parent} holds no run of this command; of the latest, {manifests[0].name}: "
        f"{changed}. Leave --resume out to add a new run, or give another --out"
    )


def sample_to_folder(
    pipe: Pipeline,
    output_run: OutputRun,
    requests: Sequence[SampleRequest],
    kind: str,
    about: Mapping[str, str],
    again: str = "the same command with --resume",
) -> None:
    """Samples and writes the images that the run lacks, then its grid; shows its progress.

    Images of one shape are sampled together, shape after shape, so that each has one program.

    A SIGINT or SIGTERM, to any process, lets the batch at work end, a second one does not. What is written is whole in
    any case.

    Args:
      kind: what `prompt` is, "prompt" or "label", for the metadata of the files; `about` is more of it.
      again: what goes on with an interrupted run, for the message.

    Raises:
      SystemExit: a signal ended the run early; the code is 128 plus its number.
    """
    paths = output_run.paths
    assert len(paths) == len(requests)
    names = {path.name for path in (*paths, output_run.grid) if path}
    remove_unfinished(paths[0].parent, names)
    whole, there = list(map(is_whole_png, paths)), [path.exists() for path in paths]

    def save(number: int, sample: Sample) -> int:
        if whole[number]:
            return 0
        own = {kind: str(sample.prompt), "index": str(sample.index), "seed": str(sample.seed)}
        own["size"] = size_text(sample.image.shape[:2])
        # What a power cut tore is sampled again; what comes there meanwhile is not ours.
        save_png(paths[number], sample.image, {**own, **about}, overwrite=there[number])
        return 1

    done, count = sum(whole), len(requests)
    with (
        StopAnyTime() as stop,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=count, initial=done, unit="image", desc="sampling", disable=count == 1) as bar,
    ):
        for numbers, batch in _sampled(pipe, requests, output_run.batch_size, whole):
            written = sum(pool.map(save, numbers, batch))
            bar.update(written)
            done += written
            if stop.due() and done < count:
                break
    if done < count:
        assert stop.received is not None
        name = signal.Signals(stop.received).name
        print(f"{name}: stopped with {done} of {count} images; {again} goes on", file=sys.stderr)
        raise SystemExit(128 + stop.received)
    if output_run.grid is not None and not is_whole_png(output_run.grid):
        images, prompts = list(map(_decoded, output_run.paths)), [one.prompt for one in requests]
        tiles = grid(images, columns=min(_COLUMNS, count), captions=list(map(str, prompts)))
        save_png(output_run.grid, tiles, {f"{kind}s": json.dumps(prompts), **about}, overwrite=True)


def _sampled(
    pipe: Pipeline, requests: Sequence[SampleRequest], batch_size: int, whole: Sequence[bool]
) -> Iterator[tuple[list[int], list[Sample]]]:
    """Numbers and images of each batch that lacks one."""
    by_shape: dict[Shape | None, list[int]] = {}
    for number, request in enumerate(requests):
        by_shape.setdefault(request.shape, []).append(number)
    for numbers in by_shape.values():
        # Beside other shapes, a few images do not fill up a batch.
        at_once = batch_size if len(by_shape) == 1 else pipe.batch_size(len(numbers), batch_size)
        batches = [numbers[start : start + at_once] for start in range(0, len(numbers), at_once)]
        lacking = [batch for batch in batches if not all(whole[number] for number in batch)]
        images = pipe.batches(([requests[number] for number in batch] for batch in lacking), at_once)
        yield from zip(lacking, images, strict=True)


def _decoded(path: Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: does not decode ({error}); remove it, and --resume samples it again") from None


def _read(manifest: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        run, *lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
        if not isinstance(run["run"], dict) or not isinstance(run["batch_size"], int) or run["batch_size"] < 1:
            raise ValueError("it is not of a run")
        if not lines or not all(Path(line["file"]).name == line["file"] for line in lines):
            raise ValueError("it does not name files beside it")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{manifest}: cannot be read ({error}); remove it, or give another --out") from None
    return run, lines


def _slug(prompt: str | int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", str(prompt).lower()).strip("-")[:60]
    return "grid-image" if slug == "grid" else slug
