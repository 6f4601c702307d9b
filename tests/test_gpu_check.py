"""`scripts/gpu_check.sh` at tiny sizes: every part leaves its results, and what a CPU cannot run is said."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from pallas_kernels.attention.shapes import SHAPES
from tests.train_runs import ROOT, quick_environment

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
# A part and what must stand in its results, one row of a table each.
ROWS = {
    "device": "cpu cpu ",
    "conformance-xla": "| xla | traced | float32 | ",
    "attention": "| 256 half | xla | ",
    "step-tiny": "| 8 | 2 | ",
    "sampling": "| 2 | ",
    "sampling-parts": "| decoder | ",
}
NEED_A_GPU = ("conformance-gpu", "conformance-tokamax", "conformance-cudnn", "tuning")


def check(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**quick_environment(), "PYTHON": sys.executable, **more}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_parts_at_tiny_sizes(tmp_path):
    done = check(str(tmp_path / "out"), "--tiny")
    out = tmp_path / "out"
    # 3: some parts could not run here, and none failed.
    assert done.returncode == 3, done.stdout + done.stderr + "".join(path.read_text() for path in out.glob("*.txt"))
    header, *rows = (line.split("\t") for line in (out / "summary.tsv").read_text().splitlines())
    results = {name: result for name, result, *_ in rows}
    results.pop("nvidia-smi", None)
    assert header[0] == "part"
    assert results == dict.fromkeys(ROWS, "done") | dict.fromkeys(NEED_A_GPU, "cannot run here")
    for name, row in ROWS.items():
        assert any(line.startswith(row) for line in (out / f"{name}.txt").read_text().splitlines()), name
    assert "FAILED" not in "".join(path.read_text() for path in out.glob("*.txt"))
    for name in NEED_A_GPU:
        assert re.fullmatch(
            r"cannot run here: .* need.* an NVIDIA GPU, this is a cpu\n", (out / f"{name}.txt").read_text()
        )


def test_a_device_that_is_not_there_is_said(tmp_path):
    done = check(str(tmp_path), "--tiny", JAX_PLATFORMS="cuda")
    assert done.returncode == 2 and "JAX finds no device" in done.stderr
    assert "device\tFAILED\t1\t" in (tmp_path / "summary.tsv").read_text()


def test_the_limits_add_up_to_less_than_nine_minutes():
    """On a GPU: four implementations are checked and three steps timed, as the loops of the script say."""
    text = SCRIPT.read_text()
    limits = {
        name: int(limit) for name, limit in re.findall(r'(?:^|&&) *part "?([a-z-]+)\S* (\d+) ', text, re.MULTILINE)
    }
    limits["step-"] = int(re.search(r'part "step-.*" (\d+) \\', text)[1])
    assert set(limits) >= {"device", "conformance-", "tuning", "attention", "step-", "sampling", "sampling-parts"}
    limits.pop("conformance-xla", None)
    limits["conformance-"] *= 4
    limits["step-"] *= 3
    assert sum(limits.values()) <= int(re.search(r"^total=(\d+)$", text, re.MULTILINE)[1]) <= 540 - 10


def test_the_shapes_that_are_measured_there_are():
    """Named, so that more of them do not take more time."""
    (named,) = re.findall(r"^  shapes=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE)
    assert len(shlex.split(named)) == 7 and set(shlex.split(named)) < set(SHAPES)


@pytest.mark.parametrize(("arguments", "message"), [((), "usage: "), (("x", "--fast"), "--fast: unknown")])
def test_wrong_arguments(tmp_path, arguments, message):
    done = subprocess.run([str(SCRIPT), *arguments], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True)
    assert done.returncode in (1, 2, 127) and message in done.stderr
