"""Wrong inputs of train.py: each one clear error, exit code 2, and nothing written."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from hart_jax import flags as hart_flags
from hart_jax.checkpoints.class_names import DATASET_FILE
from hart_jax.checkpoints.orbax import CHECKPOINT_DIR, CONFIG_FILE
from hart_jax.checkpoints.workdir import find_tokenizer
from hart_jax.config import HartExperiment, read_experiment
from hart_jax.data.precomputed import TOKENS, describe_tokens
from hart_jax.errors import UserError
from tests.in_process import only_flags_of
from tests.train_runs import run_to_end, write_hart_config, write_tokenizer_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config file that trains, beside its shards; read only."""
    return write_tokenizer_config(tmp_path_factory.mktemp("inputs"))


def contents(folder: Path) -> dict[str, bytes | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def hart_config(tmp_path_factory) -> Path:
    """Likewise, of a transformer."""
    return write_hart_config(tmp_path_factory.mktemp("hart_inputs"))


def refused(folder: Path, *arguments: str, devices: int = 1) -> str:
    """The error that train.py gives; `folder` holds everything it might write to."""
    before = contents(folder)
    code, _, err = run_to_end(*arguments, devices=devices)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err
    assert code == 2, err
    assert len(errors) == 1, err
    assert contents(folder) == before
    return errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.foo=1"], "unknown key foo; known: tokenizer, loss"),
        (["--config.train.foo=1"], "TrainConfig: unknown key foo; known: steps"),
        (["--config.train.steps.more=1"], "no such setting; did you mean --config.train.steps?"),
        (["--config.train.steps=many"], "--config.train.steps=many"),
        (["--config.loss.mse=much"], "TokenizerLossConfig.mse='much': expected float"),
        (["--config.tokenizer.patch_nums=(1, 2, 3)"], "patch_nums=(1, 2, 3): the last entry"),
        (["--config.loss.adversarial=0.1"], "image_size=8: the discriminator needs 24 px"),
        (["--config.data.test="], "data.test is empty"),
        (["--config.mesh.data=3"], "mesh: data=3, fsdp=1, tensor=1 does not multiply to the 1 devices"),
        (
            ["--config.mesh.rules=('mlpp=fsdp',)"],
            "mesh.rules: unknown rule 'mlpp=fsdp'; write AXIS=MESH_AXIS with one of",
        ),
        (["--config.mesh.rules=('mlp=pod',)"], "mesh.rules: 'mlp=pod' names no axis of the mesh; it has data, fsdp"),
        (["--config.train.accumulate=3"], "train.accumulate=3: must divide train.batch_size=4"),
        (["--config.freeze=('encoder', 'head')"], "freeze=('encoder', 'head'): give some of encoder, quant_conv"),
        (["--config.freeze=('encoder',)"], "freeze=('encoder',): needs init_from"),
        (["--stesp=3"], "Unknown command line flag 'stesp'"),
        (["three"], "unexpected argument 'three'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_command_lines(tmp_path, config, arguments, message):
    assert message in refused(tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.batch_size=12"], "train.batch_size=12: must be a multiple of data*fsdp=8"),
        (
            ["--config.train.batch_size=8", "--config.train.accumulate=2"],
            "train.batch_size=8: must be a multiple of data*fsdp*train.accumulate=16",
        ),
    ],
)
def test_batches_that_the_devices_do_not_divide(tmp_path, config, arguments, message):
    assert message in refused(tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments, devices=8)


def test_heads_that_the_devices_do_not_divide(tmp_path, hart_config):
    arguments = (f"--config={hart_config}", f"--workdir={tmp_path / 'run'}", "--config.mesh.tensor=4")
    assert "mesh: heads is 2, which tensor=4 does not divide" in refused(tmp_path, *arguments, devices=4)


@pytest.mark.parametrize("kind", ["hart", "tokenizer"])
def test_missing_stage_before(tmp_path, config, hart_config, kind):
    arguments = (f"--config={hart_config if kind == 'hart' else config}", f"--workdir={tmp_path / 'run'}")
    error = refused(tmp_path, *arguments, f"--config.init_from={tmp_path / 'absent'}")
    assert (
        f"init_from={tmp_path / 'absent'}: cannot start from it: {tmp_path / 'absent'}/config.json: no such file"
        in error
    )


def test_stages_before_of_another_kind_or_shape(tmp_path, config, hart_config):
    inputs = hart_config.parent
    hart = (f"--config={hart_config}", f"--workdir={tmp_path / 'run'}")
    error = refused(tmp_path, *hart, f"--config.init_from={inputs / 'tokenizer'}")
    assert f"init_from={inputs / 'tokenizer'}: cannot start from it" in error
    tokenizer = (f"--config={config}", f"--workdir={tmp_path / 'run'}")
    error = refused(tmp_path, *tokenizer, f"--config.init_from={inputs / 'tokenizer'}")
    assert "cannot start from it" in error
    assert "tokenizer.vocab_size is 16, the config says 32" in error


@pytest.mark.parametrize("kind", ["hart", "tokenizer"])
@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (("1:1", "7"), "data.buckets: ratio '7': write it as width:height in whole numbers, like 2:3"),
        (("2:3", "3:4"), "data.buckets: 2:3 and 3:4 both give 6x10; leave one of them out"),
        (("1:1", "1:5"), "data.buckets: ratio 1:5: at most 4:1 is possible"),
        (("1:1", "2:3"), "data.buckets: 2:3 (6x10) has 0 of the 14 images, fewer than the batch of 4; leave this"),
        ((1, 2), "DataConfig.buckets=(1, 2): expected a tuple of str"),
    ],
)
def test_buckets_that_there_are_not(tmp_path, config, hart_config, kind, buckets, message):
    arguments = (f"--config={hart_config if kind == 'hart' else config}", f"--workdir={tmp_path / 'run'}")
    assert message in refused(tmp_path, *arguments, f"--config.data.buckets={buckets!r}")


def test_a_label_beyond_the_classes_in_a_bucket(tmp_path, hart_config):
    classes = ("--config.transformer.num_classes=1", "--config.transformer.context_tokens=1")
    arguments = (f"--config={hart_config}", f"--workdir={tmp_path / 'run'}", *classes)
    error = refused(tmp_path, *arguments, "--config.data.buckets=('1:1',)")
    assert "transformer.num_classes=1: the shards hold a label 1 (things)" in error


def test_tokens_of_other_buckets_in_the_records(tmp_path, hart_config):
    """Found before text embeddings are computed."""
    experiment, folder = read_experiment(hart_config), hart_config.parent
    config, params = find_tokenizer(folder / "tokenizer")
    shards = shutil.copytree(folder / "train" / "shards", tmp_path / "shards")
    about = json.loads((shards / DATASET_FILE).read_text())
    about["precomputed"] = {TOKENS: describe_tokens(config, params, ("1:1", "2:1"))}
    (shards / DATASET_FILE).write_text(json.dumps(about))
    arguments = (f"--config={hart_config}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={shards}")
    ahead = ("--config.precompute_tokens=True", "--config.data.flip=False")
    assert experiment.tokenizer == config
    for buckets in ("()", "('1:1',)"):
        error = refused(tmp_path, *arguments, *ahead, f"--config.data.buckets={buckets}")
        assert f"{shards}: the tokens in its records were computed with another buckets" in error


def test_missing_flags(tmp_path, config):
    assert "--config is missing" in refused(tmp_path, f"--workdir={tmp_path / 'run'}")
    assert "--workdir is missing" in refused(tmp_path, f"--config={config}")


@pytest.mark.parametrize("override", [[], ["--config.train.steps=3"]], ids=["alone", "with an override"])
def test_missing_config_file(tmp_path, override):
    missing = tmp_path / "absent.py"
    error = refused(tmp_path, f"--config={missing}", f"--workdir={tmp_path / 'run'}", *override)
    assert f"--config={missing}: no such file" in error


@pytest.mark.parametrize("text", ["x = 1\n", "def get_config():\n    return {}\n", "def get_config(:\n"])
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    error = refused(tmp_path, f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'run'}")
    assert "get_config()" in error or "invalid syntax" in error


def test_workdir_that_is_a_file(tmp_path, config):
    (tmp_path / "run").write_text("notes")
    assert "is a file" in refused(tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run'}")


def test_workdir_that_checkpoints_cannot_be_kept_in(tmp_path, config):
    error = refused(tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run[1]'}")
    assert "--workdir=" in error and "run[1]: checkpoints cannot be kept" in error


def test_workdir_of_another_config(tmp_path, config):
    workdir = tmp_path / "run"
    (workdir / CHECKPOINT_DIR / "4").mkdir(parents=True)
    (workdir / CONFIG_FILE).write_text(json.dumps({"train": {"seed": 7}}))
    error = refused(tmp_path, f"--config={config}", f"--workdir={workdir}")
    assert f"{workdir} holds a run of another config" in error


def test_missing_shards(tmp_path, config):
    error = refused(
        tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={tmp_path / 'nowhere'}"
    )
    assert f"{tmp_path / 'nowhere'} is not a shard folder" in error


def test_truncated_shard(tmp_path, config):
    shards = shutil.copytree(config.parent / "train" / "shards", tmp_path / "shards")
    shard = max(shards.glob("*.array_record"))
    os.truncate(shard, shard.stat().st_size // 2)
    error = refused(tmp_path, f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={shards}")
    assert f"shard {shard} is truncated" in error


def test_missing_perceptual_weights(tmp_path, config):
    arguments = (f"--config={config}", f"--workdir={tmp_path / 'run'}")
    perceptual = ("--config.loss.perceptual=0.5", "--config.loss.perceptual_layers=2")
    assert "loss.perceptual_weights is empty" in refused(tmp_path, *arguments, *perceptual)
    missing = f"--config.loss.perceptual_weights={tmp_path / 'absent.tar.gz'}"
    assert "absent.tar.gz do not exist" in refused(tmp_path, *arguments, *perceptual, missing)


def test_a_warm_up_as_long_as_the_run_is_warned_of(tmp_path, config):
    flags = (f"--config={config}", f"--workdir={tmp_path / 'run'}", f"--config.data.train={tmp_path / 'nowhere'}")
    for steps, warned in ((4, True), (5, False)):
        _, _, err = run_to_end(*flags, f"--config.train.steps={steps}")
        assert ("warning: optimizer.warmup_steps=4: the learning rate never reaches its peak" in err) == warned


def test_help_names_the_flags():
    code, out, _ = run_to_end("--help")
    assert code == 0
    assert "--config" in out and "--workdir" in out


def test_help_with_a_config_lists_its_settings_with_what_they_mean(hart_config):
    code, out, _ = run_to_end(f"--config={hart_config}", "--config.train.steps=7", "--help")
    assert code == 0
    for line in (
        "  --config.train.steps=7    (default: 100000)",
        "  --config.transformer.diffusion.depth=1    (default: 6)",
    ):
        assert line in out.splitlines()
    assert "Length, logging, checkpoints and precision of a training run." in out
    assert set(re.findall(r"^  --config\.([\w.]+)=", out, re.MULTILINE)) == set(HartExperiment.names())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.image_size=128", "did you mean --config.tokenizer.image_size?"),
        ("trian.steps=128", "did you mean --config.train.steps?"),
        ("sample.cfg.late=1", "--config.sample.cfg.late: no such setting"),
    ],
)
def test_a_setting_that_there_is_not_is_named(config, override, said):
    with only_flags_of("train.py"), pytest.raises(UserError, match="--help lists all") as error:
        hart_flags.parse(["train.py", f"--config={config}", f"--config.{override}"])
    assert said in str(error.value)
