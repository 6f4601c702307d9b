"""What an evaluation checks before it samples: names of classes, sizes of sets, who owns the folder, what is in it."""

import dataclasses
import importlib.metadata
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_jax.checkpoints.model_folder import read_model, write_model
from hart_jax.config import HartExperiment
from hart_jax.errors import UserError
from hart_jax.evaluation import report, run
from hart_jax.io.ownership import owned
from tests.evaluation.evaluation_runs import small_evaluators
from tests.tiny import TOKENIZER, tiny_model

NAMES = ("ant", "bee", "café")
CLASSES = {"num_classes": len(NAMES), "context_tokens": 1, "disable_aln": False}


class Sampling(Exception):
    """Nothing stood in the way of sampling this."""


@pytest.fixture(autouse=True)
def nothing_is_sampled(monkeypatch, tmp_path):
    def sample(pipe, experiment, requests, *_):
        raise Sampling([one.prompt for one in requests])

    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "sample_images", sample)
    monkeypatch.setattr(run, "Pipeline", lambda *_, **__: None)
    monkeypatch.setattr(run, "load_evaluators", small_evaluators)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "model"
    write_model(folder, dataclasses.replace(tiny_model(**CLASSES), classes=NAMES))
    assert read_model(folder).classes == NAMES
    return folder


def reference(folder: Path, *categories: str) -> Path:
    """Two images of each category."""
    entries = {}
    for number, category in enumerate([*categories, *categories]):
        (folder / category).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / category / f"id{number}.png")
        entries[f"id{number}"] = {"category": category, "prompt": f"a {category}"}
    (folder / "meta_data.json").write_text(json.dumps(entries))
    return folder


def evaluate(model: Path, reference: Path, out: Path, **changes) -> None:
    experiment = HartExperiment.from_dict(
        {
            "tokenizer": TOKENIZER.to_dict(),
            "transformer": tiny_model(**CLASSES).transformer_config.to_dict(),
            "loss": {"condition_top_k": 8},
            "sample": {"top_k": 8, "top_k_late": 8},
        }
    )
    request = run.Request(
        what="generation",
        experiment=experiment,
        checkpoint=str(model),
        text_encoder=None,
        system_prompt=None,
        reference=str(reference),
        images=None,
        networks=("One", None, None),
        resize="pytorch-fid",
        lpips=None,
        count=0,
        seed=0,
        image_size=None,
        by="category",
        by_given=False,
        batch_size=4,
        draw_batch_size=0,
        out=out,
    )
    run.evaluate(dataclasses.replace(request, **changes))


def asked(*arguments, **changes) -> list[int]:
    with pytest.raises(Sampling) as sampling:
        evaluate(*arguments, **changes)
    return sampling.value.args[0]


def test_labels_go_by_the_names_of_the_classes(model, tmp_path):
    assert asked(model, reference(tmp_path / "some", "bee", "café"), tmp_path / "out") == [1, 2, 1, 2]
    other_form = unicodedata.normalize("NFD", "café")
    assert other_form != "café"
    assert asked(model, reference(tmp_path / "other", "ant", other_form), tmp_path / "out2") == [0, 2, 0, 2]


def test_classes_that_the_model_lacks_are_named_before_anything_is_sampled(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="category dog is no class of the model, whose classes are ant, bee, café"):
        evaluate(model, reference(tmp_path / "dog", "bee", "dog"), out)
    monkeypatch.setattr(run, "load_model", None)
    with pytest.raises(UserError, match="has 4 categories, the model 3 classes"):
        evaluate(model, reference(tmp_path / "four", "ant", "bee", "cow", "dog"), out)
    assert not out.exists()


@pytest.mark.slow
def test_a_model_without_names_serves_a_reference_of_all_classes_alone(tmp_path):
    write_model(tmp_path / "model", tiny_model(**CLASSES))
    every = reference(tmp_path / "every", *NAMES)
    assert asked(tmp_path / "model", every, tmp_path / "out") == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match=r"names of the model's 3 classes are not known.*transformer/classes\.json"):
        evaluate(tmp_path / "model", reference(tmp_path / "some", "bee", "cat"), tmp_path / "new")
    for damaged in ("", "3", '["a", "a"]', '["a", 1]'):
        (tmp_path / "model/transformer/classes.json").write_text(damaged)
        with pytest.raises(UserError, match=r"classes\.json: cannot be read"):
            evaluate(tmp_path / "model", every, tmp_path / "new")


def test_too_few_images_and_a_misspelt_attribute_are_said_at_once(model, tmp_path, monkeypatch):
    every = reference(tmp_path / "every", *NAMES)
    assert asked(model, every, tmp_path / "four", count=4)
    monkeypatch.setattr(run, "load_model", None)
    with pytest.raises(UserError, match=r"^3 sampled images: .* need 4 or more"):
        evaluate(model, every, tmp_path / "out", count=3)
    with pytest.raises(UserError, match=r"--by=stile: no image of --reference has it; they have category"):
        evaluate(model, every, tmp_path / "out", by="stile", by_given=True)
    assert not (tmp_path / "out").exists()


def test_a_second_evaluation_into_one_folder_is_refused(model, tmp_path):
    every = reference(tmp_path / "every", *NAMES)
    with (
        owned(tmp_path / "out", "an evaluation"),
        pytest.raises(UserError, match="out: belongs to an evaluation on host"),
    ):
        evaluate(model, every, tmp_path / "out")
    assert asked(model, every, tmp_path / "out")


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"a": NaN}'])
def test_a_damaged_record_of_an_evaluation_is_named(tmp_path, damaged):
    (tmp_path / "run.json").write_text(damaged)
    with pytest.raises(UserError, match=r"run\.json"):
        report.begin(tmp_path, {"what": "pictures"})


def test_results_are_written_where_the_package_is_not_installed(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    report.finish(tmp_path, {"what": "pictures"}, {}, [{"images of": "x"}])
    assert json.loads((tmp_path / "results.json").read_text())["software"] == {"hart_jax": None, "jax": None}
