"""An interrupted run of `sample.py` goes on: every image once, to the last bit the one of an undisturbed run."""

import re
import signal
from pathlib import Path

import pytest

from hart_jax.io.images import read_png_metadata
from tests.sample_runs import sample, start, write_prompts, write_tiny
from tests.train_runs import signal_when

COUNT, MANIFEST = 20, "00000-pictures.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("resume"))
    write_prompts(folder / "prompts.jsonl", COUNT)
    return folder


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--num_images=2", "--batch_size=3", f"--prompts_file={folder / 'prompts.jsonl'}"]
    return [f"--config={folder / 'tiny.py'}", *given, f"--out={out}", *more]


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    code, out, err = sample(folder, *flags(folder, folder / "whole"))
    assert code == 0 and "40/40" in err, err
    assert out.strip() == str(folder / "whole/00000-grid.png")
    return contents(folder / "whole")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def images(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("[0-9]*.png") if not path.name.endswith("-grid.png"))


def test_every_image_has_its_prompt_and_seed(folder, whole):
    paths = images(folder / "whole")
    assert len(paths) == 2 * COUNT and len(whole) == len(paths) + 2
    about = read_png_metadata(paths[-1])
    assert (about["prompt"], about["seed"], about["index"]) == ("3d apples", "104", "1")
    # Of one prompt under five seeds, two of each.
    assert len({whole[path.name] for path in paths if "a-red-apple" in path.name}) == 10


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_goes_on(folder, whole, tmp_path, number):
    out = tmp_path / "out"
    process = start(folder, *flags(folder, out))
    code, _, err = signal_when(process, lambda: len(images(out)) >= 4, number)
    before = {path: path.stat().st_mtime_ns for path in images(out)}
    assert 4 <= len(before) < 2 * COUNT
    if number == signal.SIGTERM:
        assert code == 128 + number and len(before) % 3 == 0
        assert f"SIGTERM: stopped with {len(before)} of 40 images" in err
    # What a killed process leaves of an image that it was writing.
    (out / f".{sorted(whole)[-2]}.123").write_bytes(b"half")
    code, _, err = sample(folder, *flags(folder, out, "--resume", "--batch_size=0"))
    assert code == 0, err
    assert contents(out) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert re.search(rf" {len(before)}/40 ", err)


def test_a_complete_run_stays_and_others_are_told_apart(folder, whole, tmp_path):
    out = folder / "whole"
    code, printed, _ = sample(folder, *flags(folder, out, "--resume"))
    assert code == 0 and "00000-grid.png" in printed and contents(out) == whole
    code, _, err = sample(folder, *flags(folder, out, "--resume", "--cfg=1", "--seed=3"))
    assert code == 2 and "settings.cfg is 4.5 there, 1.0 here" in err
    code, _, err = sample(folder, *flags(folder, out, "--resume", "--num_images=1"))
    assert code == 2 and "other prompts, seeds, sizes or numbers of images" in err
    assert contents(out) == whole
