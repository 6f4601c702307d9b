"""Training by class label, and a curriculum whose stages start from the one before, from the command lines alone."""

from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.checkpoints.class_names import read_classes
from hart_jax.checkpoints.model_folder import read_model
from hart_jax.checkpoints.orbax import load_params
from hart_jax.data.shards import write_shards
from hart_jax.io.images import read_png_metadata
from hart_jax.training.metrics import read_metrics
from tests.in_process import run_here
from tests.train_runs import ROOT, run_to_end, write_hart_config, write_tokenizer_config

# 24 images of the bundled model's set, at 32 px.
EMOJI = ROOT / "tests" / "emoji"
LENGTH = ["--config.train.steps=4", "--config.train.save_every=4", "--config.train.sample_every=0"]
CLASSES = [
    "--config.transformer.num_classes=2",
    "--config.transformer.context_tokens=1",
    "--config.transformer.disable_aln=False",
    "--config.text_encoder=",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def config(folder) -> Path:
    return write_hart_config(folder / "inputs")


@pytest.mark.slow
def test_class_conditional_training_export_and_sampling(folder, config):
    run, model, out = folder / "classes", folder / "classes_model", folder / "classes_out"
    code, _, err = run_to_end(f"--config={config}", f"--workdir={run}", *LENGTH, *CLASSES)
    assert code == 0, err
    assert [line["step"] for line in read_metrics(run)] == [2, 4]
    assert load_params(run)["class_embed"].shape == (3, 16)
    code, _, err = run_here("hart_jax.checkpoints.export", "--workdir", str(run), "--out", str(model))
    assert code == 0, err
    assert sorted(path.name for path in model.iterdir()) == ["sampling.json", "tokenizer", "transformer"]
    assert read_model(model).classes == read_classes(run) == ("animals", "things")
    sample = ["sample.py", f"--config={config}", *CLASSES, f"--checkpoint={model}", f"--out={out}"]
    code, _, err = run_here(*sample, "--labels=1,0")
    assert code == 0, err
    expected = ["00000-1.png", "00000-grid.png", "00000-pictures.jsonl", "00001-0.png"]
    assert sorted(path.name for path in out.iterdir()) == expected
    about = read_png_metadata(out / "00001-0.png")
    assert about["label"] == "0" and "prompt" not in about
    for wrong in (["--labels=2"], ["--labels=cat"], ["--prompt=a dog"], []):
        code, _, err = run_here(*sample, *wrong)
        assert code == 2 and "--labels" in err, err


def test_labels_beyond_the_classes_are_refused(folder, config):
    code, _, err = run_to_end(
        f"--config={config}", f"--workdir={folder / 'one'}", *LENGTH, *CLASSES, "--config.transformer.num_classes=1"
    )
    assert code == 2 and "the shards hold a label 1" in err


def stage(folder: Path, config: Path, name: str, *arguments: str) -> Path:
    """The workdir of a stage, trained for two steps."""
    length = ["--config.train.steps=2", "--config.train.batch_size=4", "--config.train.sample_every=0"]
    code, _, err = run_to_end(f"--config={config}", f"--workdir={folder / name}", *length, *arguments)
    assert code == 0, err
    assert read_metrics(folder / name)[-1]["step"] == 2
    return folder / name


def scales(sides: tuple[int, ...]) -> list[str]:
    """The settings of another image size, at two pixels a token."""
    size = f"--config.tokenizer.image_size={2 * sides[-1]}"
    return [size, *(f"--config.{part}.patch_nums={sides}" for part in ("tokenizer", "transformer"))]


# No step is large enough to leave where the stage before ended.
STILL = "--config.optimizer.learning_rate=1e-12"


@pytest.mark.slow
def test_the_whole_curriculum(folder, config):
    """Stand-ins for VAR's tokenizer, the hybrid one, and the transformer at 256, 512 and 1024 px, on real images."""
    tokenizer_config = write_tokenizer_config(folder / "tokenizer_inputs")
    write_shards(EMOJI, folder / "emoji", records_per_shard=8)
    images = f"--config.data.train={folder / 'emoji'}"
    same = [images, "--config.tokenizer.vocab_size=16", "--config.tokenizer.share_quant_resi=2"]
    discrete = stage(folder, tokenizer_config, "discrete", *same, "--config.loss.continuous_fraction=0.0")
    freeze = "--config.freeze=('encoder', 'quant_conv', 'quantizer')"
    hybrid_settings = [*same, freeze, f"--config.init_from={discrete}", "--config.loss.restart_below=0.0"]
    hybrid = stage(folder, tokenizer_config, "hybrid", *hybrid_settings)
    before, after = load_params(discrete, "model.ema"), load_params(hybrid, "frozen")
    assert sorted(after) == ["encoder", "quant_conv", "quantizer"]
    jax.tree.map(np.testing.assert_array_equal, {name: before[name] for name in after}, after)
    decoder = load_params(hybrid, "model.params")
    assert sorted(decoder) == ["decoder", "post_quant_conv"]
    assert np.any(decoder["decoder"]["conv_out"]["kernel"] != before["decoder"]["conv_out"]["kernel"])

    on_top = [images, f"--config.tokenizer_from={hybrid}"]
    first = stage(folder, config, "first", *on_top)
    second = stage(folder, config, "second", *on_top, f"--config.init_from={first}", STILL, *scales((1, 2, 4, 8)))
    third = stage(folder, config, "third", *on_top, f"--config.init_from={second}", STILL, *scales((1, 2, 4, 6, 8, 16)))
    for earlier, later in ((first, second), (second, third)):
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6),
            load_params(earlier, "ema"),
            load_params(later, "params"),
        )
    assert {"loss_scale_5", "accuracy_scale_5"} <= set(read_metrics(third)[-1])
