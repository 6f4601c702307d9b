"""The README's commands: those that draw are run, others are in the scripts that made and measured the model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ("make_bundled_model.sh", "evaluate_bundled_model.sh")


def commands() -> list[str]:
    """Every command of the README's shell blocks, without comments, on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("    #")[0].strip() for block in blocks for line in on_one_line(block).splitlines()]
    return [line for line in lines if line]


def on_one_line(text: str) -> str:
    return re.sub(r"\\\n\s*", "", text)


DRAWING = [command for command in commands() if command.startswith("python sample.py")]


def test_every_command_is_of_a_kind_that_something_runs():
    scripts = on_one_line("".join((ROOT / "scripts" / name).read_text() for name in SCRIPTS))
    # What CI runs itself, and what has a test of its own (tests/checkpoints/convert/test_command.py).
    elsewhere = ("make sample", "make test", "pip install -e", "python -m hart_jax.checkpoints.convert")
    for command in commands():
        if command in DRAWING or command.startswith(elsewhere):
            continue
        start = re.sub(r"(--out)[ =](assets/emoji|scores/\w+)$", r"\1", command)
        assert start in scripts, f"{command!r} is neither run by a test nor part of {' or '.join(SCRIPTS)}"


@pytest.mark.parametrize("command", DRAWING)
def test_drawing_commands_run(command, tmp_path):
    arguments = [part for part in shlex.split(command)[2:] if not part.startswith("--out=")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "sample.py", *arguments, f"--out={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert list(tmp_path.glob("*.png"))
