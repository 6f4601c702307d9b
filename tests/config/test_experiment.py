"""Experiments: read from config files, checked as a whole."""

import dataclasses
import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hart_jax.config import (
    HartExperiment,
    HartLossConfig,
    SampleConfig,
    TokenizerConfig,
    TokenizerExperiment,
    TokenizerLossConfig,
    TransformerConfig,
    experiment_from,
    read_experiment,
    split_config,
)
from hart_jax.errors import UserError

FOLDER = Path(__file__).parents[2] / "configs"
STAGES = {"emoji_hart": 4, "emoji_tokenizer": 3}
CONFIGS = sorted(FOLDER.glob("*.py"))
LATER = [FOLDER / f"{name}.py:stage={stage}" for name, count in STAGES.items() for stage in range(2, count + 1)]
SMALL = {"image_size": 16, "patch_nums": (1, 2, 4, 8), "channels": 32, "channel_multipliers": (1, 2)}


def config_file(folder: Path, body: str) -> Path:
    path = folder / "experiment.py"
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return {body}\n")
    return path


@pytest.mark.parametrize("path", [*CONFIGS, *LATER], ids=lambda path: path.name)
def test_every_config_file_is_read_and_survives_a_round_trip(path):
    experiment = read_experiment(path)
    assert experiment_from(experiment.to_dict()) == experiment


@pytest.mark.parametrize("path", [*CONFIGS, *LATER], ids=lambda path: path.name)
def test_the_docstring_is_the_launch_command(path):
    file, _ = split_config(path)
    assert f"--config=configs/{path.name} " in Path(file).read_text()


@pytest.mark.parametrize(("name", "count"), STAGES.items())
def test_a_stage_starts_where_the_one_before_ends(name, count):
    path = FOLDER / f"{name}.py"
    workdirs = dict(re.findall(r"--config=configs/(\S+) --workdir=(\S+)", path.read_text()))
    assert read_experiment(f"{path}:stage=1") == read_experiment(path) and not read_experiment(path).init_from
    before = path.name
    for stage in range(2, count + 1):
        experiment = read_experiment(f"{path}:stage={stage}")
        assert experiment.init_from == workdirs[before]
        before = f"{path.name}:stage={stage}"
    assert len(set(workdirs.values())) == count
    tokenizer = read_experiment(FOLDER / "emoji_hart.py").tokenizer_from
    assert tokenizer in (FOLDER / "emoji_tokenizer.py").read_text()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("emoji_hart.py:stage=5", "there is no 'stage=5'; the stages are stage=1, stage=2, stage=3, stage=4"),
        ("emoji_hart.py:stage=0", "there is no 'stage=0'"),
        ("emoji_hart.py:", "there is no ''"),
        ("emoji_tokenizer.py:3", "there is no '3'; the stages are stage=1, stage=2, stage=3"),
        ("hart_d20.py:stage=2", "has no stages"),
    ],
)
def test_a_stage_that_is_not_there_is_one_error(config, message):
    path = FOLDER / config.split(":")[0]
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: {message}')}"):
        read_experiment(FOLDER / config)
    run = command(f"--config={FOLDER / config}")
    assert run.returncode == 2 and run.stderr.startswith(f"error: --config={path}: {message}")
    assert len(run.stderr.splitlines()) == 1


def test_a_file_of_stages_alone_says_so(tmp_path):
    path = tmp_path / "staged.py"
    path.write_text("def get_config(argument): pass")
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}: needs a stage; give {path}:stage=1')}$"):
        read_experiment(path)
    run = command(f"--config={path}")
    assert run.returncode == 2 and run.stderr == f"error: --config={path}: needs a stage; give {path}:stage=1\n"


def test_a_stage_can_be_changed_on_the_command_line():
    run = command(f"--config={FOLDER / 'emoji_hart.py:stage=3'}", "--config.train.steps=7")
    expected = read_experiment(FOLDER / "emoji_hart.py:stage=3")
    expected = dataclasses.replace(expected, train=dataclasses.replace(expected.train, steps=7))
    assert experiment_from(json.loads(run.stdout)) == expected, run.stderr


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that prints the experiment of its flags."""
    code = """
import json
from hart_jax import flags
from hart_jax.errors import run_cli

def main():
    flags.parse()
    print(json.dumps(flags.experiment().to_dict()))

run_cli(main)
"""
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_section_can_be_changed_on_the_command_line(path):
    """`--config.mesh.fsdp=2` needs the section in the file."""
    sections = {name for name, value in read_experiment(path).to_dict().items() if isinstance(value, dict)}
    written = runpy.run_path(str(path))["get_config"]()
    assert sections - {"loss", "optimizer", "sample"} <= set(written)


def test_kind_is_told_by_the_transformer():
    assert isinstance(experiment_from({}), TokenizerExperiment)
    assert isinstance(experiment_from({"transformer": {}}), HartExperiment)


def test_reads_a_file(tmp_path):
    experiment = read_experiment(config_file(tmp_path, "ConfigDict({'train': {'steps': 7}})"))
    assert isinstance(experiment, TokenizerExperiment)
    assert experiment.train.steps == 7


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match=r"absent\.py: no such config file"):
        read_experiment(tmp_path / "absent.py")
    with pytest.raises(UserError, match="no such config file"):
        read_experiment(tmp_path)
    nothing = tmp_path / "nothing.py"
    nothing.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"nothing\.py: a config file defines get_config"):
        read_experiment(nothing)
    with pytest.raises(UserError, match=r"ConfigDict"):
        read_experiment(config_file(tmp_path, "{'train': {}}"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimiser": {}}, "TokenizerExperiment: unknown key optimiser"),
        ({"train": {"step": 1}}, "TrainConfig: unknown key step"),
        ({"train": 3}, "TokenizerExperiment.train=3: expected TrainConfig"),
        ({"transformer": {}, "sample": {"topk": 1}}, "SampleConfig: unknown key topk"),
        ({"transformer": {}, "sample_prompts": ("a", 1)}, "expected a tuple of str"),
    ],
)
def test_wrong_keys_and_types(values, message):
    with pytest.raises(UserError, match=message):
        experiment_from(values)


def test_tokenizer_too_small_for_its_losses():
    tokenizer = TokenizerConfig(**SMALL)
    with pytest.raises(UserError, match=r"image_size=16: the discriminator needs 24 px"):
        TokenizerExperiment(tokenizer=tokenizer, loss=TokenizerLossConfig(adversarial=0.1))
    TokenizerExperiment(tokenizer=tokenizer, loss=TokenizerLossConfig(adversarial=0.0))
    tiny = TokenizerConfig(**{**SMALL, "image_size": 8, "patch_nums": (1, 4)})
    with pytest.raises(UserError, match=r"perceptual_layers=5: too many for image_size=8"):
        TokenizerExperiment(tokenizer=tiny, loss=TokenizerLossConfig(adversarial=0.0))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"masked_iterations": 0}, "masked_iterations=0"),
    ],
)
def test_bad_sampling_settings(values, named):
    with pytest.raises(UserError, match=f"^{named}: must be"):
        SampleConfig(**values)


@pytest.mark.parametrize(("name", "value"), [("cfg", "a"), ("top_k", 2.5), ("smooth", 1), ("dtype", None)])
def test_sampling_settings_of_another_type(name, value):
    with pytest.raises(UserError, match=rf"SampleConfig\.{name}={value!r}: expected"):
        SampleConfig(**{name: value})
    assert SampleConfig(cfg=3).cfg == 3.0


@pytest.mark.parametrize("name", ["top_k", "top_k_late"])
def test_top_k_over_the_vocabulary(name):
    SampleConfig(**{name: 4096}).check_fits(TokenizerConfig())
    with pytest.raises(UserError, match=f"^{name}=4097: the codebook has 4096 codes"):
        HartExperiment(sample=SampleConfig(**{name: 4097}))


@pytest.mark.parametrize(("name", "value"), [("cfg", math.inf), ("temperature", math.inf), ("cfg", math.nan)])
def test_settings_are_finite(name, value):
    for make in (lambda values: SampleConfig(**values), SampleConfig.from_dict):
        with pytest.raises(UserError, match=f"{name}={value}: must be .*"):
            make({name: value})
    with pytest.raises(UserError, match=r"TransformerConfig\.norm_eps=inf: must be finite"):
        TransformerConfig.from_dict({"norm_eps": math.inf})


def test_more_iterations_than_positions():
    HartExperiment(sample=SampleConfig(masked_iterations=256))
    with pytest.raises(UserError, match=r"masked_iterations=257: the last scale has 256 positions"):
        HartExperiment(sample=SampleConfig(masked_iterations=257))


def test_condition_top_k_over_the_vocabulary():
    with pytest.raises(UserError, match=r"loss.condition_top_k=5000: the codebook has 4096 codes"):
        HartExperiment(loss=HartLossConfig(condition_top_k=5000))


def test_transformer_of_another_tokenizer():
    with pytest.raises(UserError, match=r"transformer.vocab_size=512 does not match tokenizer.vocab_size=4096"):
        HartExperiment(transformer=TransformerConfig(vocab_size=512))
