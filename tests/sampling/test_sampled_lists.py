"""One model at several lists of scales: the model's own to the bit, others where they are trained or asked for."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hart_jax.config import SampleConfig
from hart_jax.errors import UserError
from hart_jax.io.files import read_json
from hart_jax.io.images import read_png_metadata
from hart_jax.sampling import pipeline
from hart_jax.sampling.pipeline import Pipeline, load
from hart_jax.sampling.rules import HART_RULES, Rules, SampleNumbers
from hart_jax.sampling.sampler import make_sampler
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.model import Hart
from tests.sample_runs import sample, write_tiny
from tests.tiny import TOKENIZER, tiny_model, transformer_config

SETTINGS = SampleConfig(top_k=8, top_k_late=8)
# Its own list is (1, 2, 4).
CLASSES = {"num_classes": 3, "context_tokens": 1}
LISTED = tiny_model(**CLASSES, scale_lists=((1, 4),))


def images_of(**changes) -> np.ndarray:
    return Pipeline(LISTED, dataclasses.replace(SETTINGS, **changes))([0, 1], seed=3)


@pytest.fixture(scope="module")
def own() -> np.ndarray:
    """Of a model that says nothing of lists."""
    return Pipeline(tiny_model(**CLASSES), SETTINGS)([0, 1], seed=3)


@pytest.mark.parametrize("scales", [(), 3, (1, 2, 4)])
def test_the_models_own_list_gives_the_same_bits(own, scales):
    np.testing.assert_array_equal(images_of(scales=scales), own)


@pytest.mark.parametrize("layered", [False, True])
def test_a_trained_list_is_sampled_by_its_number_or_its_scales(own, monkeypatch, layered):
    monkeypatch.setattr(pipeline, "samples_by_layers", lambda model: layered)
    by_number = images_of(scales=2)
    assert by_number.shape == own.shape and (by_number != own).any()
    np.testing.assert_array_equal(by_number, images_of(scales=(1, 4)))


def test_a_list_has_other_sizes_of_image_too():
    pipe = Pipeline(LISTED, dataclasses.replace(SETTINGS, scales=2))
    assert pipe.settings.scales == (1, 4) and pipe.own_shape == (8, 8)
    # Three scales need four tokens in a row; two scales do not.
    assert pipe([1], size=(4, 4)).shape == (1, 4, 4, 3)
    with pytest.raises(UserError, match=r"size 4x4: too small for the 3 scales"):
        Pipeline(LISTED, SETTINGS)([1], size=(4, 4))


def test_other_lists_are_refused_unless_they_are_asked_for():
    one = tiny_model(**CLASSES)
    for model, trained in ((one, r"1,2,4 \(3 scales\)\."), (LISTED, r"1,2,4 \(3 scales\), 1,4 \(2 scales\)\.")):
        with pytest.raises(UserError, match=rf"not trained on the scales 1,3,4; it was on {trained}"):
            Pipeline(model, dataclasses.replace(SETTINGS, scales=(1, 3, 4)))
    with pytest.raises(UserError, match=r"not trained on 2 scales; .* --untrained_scales \(untrained_scales=True\)"):
        Pipeline(one, dataclasses.replace(SETTINGS, scales=2))
    pipe = Pipeline(one, dataclasses.replace(SETTINGS, scales=2), untrained_scales=True)
    assert pipe.settings.scales == (1, 4)
    with pytest.raises(UserError, match="scales: compiled into the pipeline; give it to load or Pipeline"):
        pipe([1], scales=3)


def test_a_sampler_takes_its_list_from_its_networks():
    networks = Hart(LISTED.transformer_config), Tokenizer(TOKENIZER)
    with pytest.raises(ValueError, match=r"scales=\(1, 4\): a sampler's list is that of `hart.config`"):
        make_sampler(*networks, dataclasses.replace(SETTINGS, scales=(1, 4)))


def test_guidance_and_late_scales_are_those_of_the_scale_that_each_stands_for():
    base = transformer_config(patch_nums=[1, 2, 3, 4, 6, 8])
    settings = SampleConfig(cfg=5.0, top_k=9, top_k_late=4, late_scale=4)
    whole = SampleNumbers.of(settings, HART_RULES, base)
    np.testing.assert_array_equal(whole.guidance_S2[:, 1], [0, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(whole.top_k_S, [9, 9, 9, 9, 4, 4])
    levels = [0, 2, 4, 5]
    fewer = SampleNumbers.of(settings, HART_RULES, base.of_list((1, 3, 6, 8)))
    np.testing.assert_array_equal(fewer.guidance_S2, whole.guidance_S2[levels])
    np.testing.assert_array_equal(fewer.top_k_S, whole.top_k_S[levels])
    # Iterations are asked of the list as it is: its last scale alone is its last.
    asked = []
    rules = Rules(iterations=lambda settings, *scale: asked.append(scale) or 1)
    rules.iterations_of(settings, base.of_list((1, 7, 8)).shapes)
    assert asked == [(0, 3), (1, 3), (2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder that is trained on two lists, and one on its own alone."""
    folder = write_tiny(tmp_path_factory.mktemp("lists"))
    shutil.copytree(folder / "model", folder / "listed")
    config = folder / "listed" / "transformer" / "config.json"
    config.write_text(json.dumps({**read_json(config), "scale_lists": [[1, 4]]}))
    return folder


@pytest.mark.slow
def test_sample_py_takes_them_and_says_so_in_its_files(folder, tmp_path):
    asked = (f"--checkpoint={folder / 'listed'}", "--prompt=a red apple", "--top_k=8")
    # A config that says nothing of lists does not hide those of the model.
    config, out = f"--config={folder / 'tiny.py'}", tmp_path / "out"
    code, _, err = sample(folder, config, *asked, "--num_images=2", "--scales=2", f"--out={out}")
    assert code == 0, err
    run = json.loads((out / "00000-pictures.jsonl").read_text().splitlines()[0])
    about = json.loads(read_png_metadata(out / "00001-a-red-apple.png")["settings"])
    assert run["run"]["settings"]["scales"] == about["scales"] == [1, 4]
    # What names the model's own list is no setting; a list that was allowed looks as a trained one does.
    for number, flags in enumerate((["--scales=3"], [])):
        code, _, err = sample(folder, *asked, *flags, f"--out={tmp_path / f'{number}.png'}")
        assert code == 0, err
        assert "scales" not in json.loads(read_png_metadata(tmp_path / f"{number}.png")["settings"])
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    one = (f"--checkpoint={folder / 'model'}", *asked[1:])
    flags = ("--scales=2", "--untrained_scales", "--size=12x8")
    code, _, err = sample(folder, *one, *flags, f"--out={tmp_path / 'wide.png'}")
    assert code == 0, err
    about = read_png_metadata(tmp_path / "wide.png")
    assert about["size"] == "12x8" and json.loads(about["settings"])["scales"] == [1, 4]
    assert "untrained" not in about["settings"]


def test_a_wrong_list_is_one_clear_error_and_nothing_is_written(folder, tmp_path):
    prompt = "--prompt=a red apple"
    for flags, message in (
        (["--scales=2"], "scales: the model was not trained on 2 scales; it was on 1,2,4 (3 scales)"),
        (["--scales=1,3,4"], "not trained on the scales 1,3,4"),
        (["--scales=two"], "scales 'two': give a number of scales, like 5"),
        (["--scales=7", "--untrained_scales"], "scales=7: the model has 3 scales"),
        (["--scales=1,2", "--untrained_scales"], "scales: (1, 2) must begin with 1 and end with 4"),
        (["--scales=1,4", "--untrained_scales", "--size=2x2"], "size 2x2: too small for the 2 scales"),
    ):
        code, _, err = sample(folder, f"--checkpoint={folder / 'model'}", prompt, *flags, f"--out={tmp_path / 'out'}")
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert message in err
        assert not any(tmp_path.iterdir())


def test_a_notebook_loads_a_model_at_a_list(folder):
    pipe = load(folder / "listed", scales=2, top_k=8)
    assert pipe.settings.scales == (1, 4)
    assert load(folder / "model", scales=2, untrained_scales=True).settings.scales == (1, 4)
