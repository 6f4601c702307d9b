"""Every `python -m hart_jax...` command, run to its end: what it prints last, and that it ends well.

What each of them computes is tested beside its module; here is what only the command has: its flags as strings, its
last line, its exit code.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hart_jax
from hart_jax.data.shards import write_shards
from hart_jax.errors import run_cli
from hart_jax.text.minilm import import_minilm
from tests.data.conftest import make_folder
from tests.tiny_bert import write_published
from tests.train_runs import ROOT

# Commands whose success another file runs.
ELSEWHERE = {
    "hart_jax.checkpoints.convert.__main__": "tests/checkpoints/convert/test_command.py",
    "hart_jax.data.emoji.__main__": "tests/data/emoji/test_build.py",
    "hart_jax.planning.cost_report": "tests/planning/test_cost_report.py",
    "hart_jax.checkpoints.export": "tests/checkpoints/test_export.py",
    "hart_jax.planning.plan": "tests/planning/test_plan.py",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands read: images, shards, a published text encoder and ours, a run's metrics."""
    made = tmp_path_factory.mktemp("made")
    write_shards(make_folder(made / "images"), made / "shards", records_per_shard=10)
    import_minilm(write_published(made / "published"), made / "encoder")
    (made / "run").mkdir()
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 6)]
    (made / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return made


# Of each command: its last line, and a file that it leaves.
COMMANDS = {
    "hart_jax.data.shards --source {made}/images --out {out}": (
        r"23 records in 1 shards in \S+/out; 0 images left out",
        "{out}/dataset.json",
    ),
    "hart_jax.data.shards --verify {made}/shards": (r"3 shards of \S+ match SHA256SUMS", None),
    "hart_jax.data.pick_prompts --shards {made}/shards --count 5 --out {out}": ("", "{out}"),
    "hart_jax.data.precompute --shards {made}/shards --out {out} --text_encoder {made}/encoder --context_tokens 6": (
        r"23 records with texts in \S+/out",
        "{out}/dataset.json",
    ),
    "hart_jax.data.tfds_builder --source {made}/images --data_dir {out}": (
        r"data set in \S+/out/captioned_images/\S+",
        "{out}/captioned_images",
    ),
    "hart_jax.text.minilm --source {made}/published --out {out} --dtype int8": ("", "{out}/config.json"),
    "hart_jax.training.curves {made}/run": (r"\S+/run/curves.png", "{made}/run/curves.png"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_to_its_end(command, made, tmp_path, monkeypatch, capsys):
    last_line, file = COMMANDS[command]
    folders = {"made": made, "out": tmp_path / "out"}
    module, *arguments = command.format(**folders).split()
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    run_cli(import_module(module).main)  # a failure ends with SystemExit
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(last_line, lines[-1] if lines else ""), lines
    assert file is None or Path(file.format(**folders)).exists()


def test_every_command_is_run_somewhere():
    package = Path(hart_jax.__file__).parent
    commands = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in package.rglob("*.py")
        if "run_cli(main)" in path.read_text()
    }
    assert commands == {command.split()[0] for command in COMMANDS} | set(ELSEWHERE)
    for module, test in ELSEWHERE.items():
        name = module.removesuffix(".__main__")
        assert re.search(rf"\b{re.escape(name)}\b", (ROOT / test).read_text()), f"{test} does not run {name}"
