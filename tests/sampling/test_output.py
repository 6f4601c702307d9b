"""Images into a folder: one run at a time, what is torn is sampled again, and runs of other models are told apart."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from hart_jax.config import SampleConfig
from hart_jax.errors import UserError
from hart_jax.io.images import is_whole_png, read_png_metadata, save_png
from hart_jax.sampling import output
from hart_jax.sampling.pipeline import Sample, SampleRequest, text_source
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]


class Pipeline:
    """Images of one grey, their seed's; keeps what it was asked for."""

    def __init__(self):
        self.sampled: list[SampleRequest] = []

    def batch_size(self, count, wanted):
        return min(count, wanted)

    def batches(self, batches, size):
        for batch in batches:
            self.sampled += batch
            images = [np.full((*(one.shape or (4, 4)), 3), one.seed, np.uint8) for one in batch]
            yield [Sample(one.prompt, one.seed, one.index, image) for one, image in zip(batch, images, strict=True)]


def sample(out: Path, *prompts: str, resume: bool = False) -> list[str]:
    """Samples one image of each; gives the prompts that were sampled."""
    requests, pipe = [SampleRequest(prompt, seed, 0) for seed, prompt in enumerate(prompts)], Pipeline()
    output_run = output.open_run(out, requests, {"model": "x"}, 1, lambda wanted: wanted, resume)
    output.sample_to_folder(pipe, output_run, requests, "prompt", {})
    return [one.prompt for one in pipe.sampled]


def test_a_torn_image_or_grid_is_sampled_again(tmp_path):
    prompts = ("a dog", "a cat", "an ant", "a bee")
    sample(tmp_path, *prompts)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = sorted(whole)
    assert names[-1] == "00003-a-bee.png" and len(whole) == 6
    (tmp_path / "00000-a-dog.png").write_bytes(b"")
    (tmp_path / "00001-a-cat.png").write_bytes(whole["00001-a-cat.png"][:-20])
    (tmp_path / "00002-an-ant.png").write_bytes(bytes(len(whole["00002-an-ant.png"])))
    (tmp_path / "00000-grid.png").write_bytes(b"")
    assert sample(tmp_path, *prompts, resume=True) == ["a dog", "a cat", "an ant"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    assert sample(tmp_path, *prompts, resume=True) == []


def test_images_of_several_sizes_are_sampled_size_by_size_and_numbered_as_asked(tmp_path):
    """And a run that goes on samples the batches that lack one, as they were."""
    shapes = [None, (2, 8), None, (8, 2), (2, 8), None, (2, 8)]
    requests = [SampleRequest("x", seed, 0, shape=shape) for seed, shape in enumerate(shapes)]

    def sampled(resume: bool) -> list[int]:
        pipe = Pipeline()
        output_run = output.open_run(tmp_path, requests, {"model": "x"}, 2, lambda wanted: wanted, resume)
        output.sample_to_folder(pipe, output_run, requests, "prompt", {})
        return [one.seed for one in pipe.sampled]

    assert sampled(resume=False) == [0, 2, 5, 1, 4, 6, 3]
    for seed, shape in enumerate(shapes):
        path = tmp_path / f"{seed:05d}-x.png"
        about, (height, width) = read_png_metadata(path), shape or (4, 4)
        assert (about["seed"], about["size"]) == (str(seed), f"{width}x{height}")
        assert (np.asarray(Image.open(path)) == np.full((height, width, 3), seed)).all()
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for seed in (2, 6, 3):
        (tmp_path / f"{seed:05d}-x.png").unlink()
    assert sampled(resume=True) == [0, 2, 6, 3]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    requests[1] = dataclasses.replace(requests[1], shape=(8, 2))
    with pytest.raises(UserError, match="it has other prompts, seeds, sizes or numbers of images"):
        sampled(resume=True)


def test_an_image_that_is_damaged_within_is_named_where_it_is_needed(tmp_path):
    sample(tmp_path, "a dog", "a cat")
    path = tmp_path / "00001-a-cat.png"
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes(len(data) - 60) + data[-20:])
    (tmp_path / "00000-grid.png").unlink()
    with pytest.raises(UserError, match=r"00001-a-cat\.png: does not decode .* --resume samples it again"):
        sample(tmp_path, "a dog", "a cat", resume=True)


def test_a_whole_png_has_both_its_ends(tmp_path):
    save_png(tmp_path / "x.png", np.zeros((2, 2, 3), np.uint8))
    data = (tmp_path / "x.png").read_bytes()
    for content, whole in ((data, True), (data[:-1], False), (data[1:], False), (b"", False), (b"x", False)):
        (tmp_path / "y.png").write_bytes(content)
        assert is_whole_png(tmp_path / "y.png") == whole
    assert not is_whole_png(tmp_path / "none" / "z.png")


def test_the_prompt_grid_does_not_take_the_grids_name(tmp_path):
    sample(tmp_path, "Grid!", "a dog")
    assert read_png_metadata(tmp_path / "00000-grid-image.png")["prompt"] == "Grid!"
    assert json.loads(read_png_metadata(tmp_path / "00000-grid.png")["prompts"]) == ["Grid!", "a dog"]


@pytest.mark.parametrize("name", ["x.PNG", "x.Png"])
def test_the_ending_of_one_file_may_be_in_capitals(tmp_path, name):
    sample(tmp_path / name, "a dog")
    assert is_whole_png(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jpg", "x.JPEG", "x.webp"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="images are written as PNG"):
        output.check_out(tmp_path / name, 1, resume=False)
    (tmp_path / name).mkdir()
    output.check_out(tmp_path / name, 1, resume=False)


def test_where_nothing_can_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "x.png", tmp_path / "file" / "new"):
        with pytest.raises(NotADirectoryError, match="file"):
            output.check_out(out, 1, resume=False)
    with pytest.raises(OSError, match="File name too long"):
        output.check_out(tmp_path / ("x" * 300), 1, resume=False)


@pytest.mark.parametrize("name", ["outputs", "one.png"])
def test_a_second_run_is_refused_at_once(tmp_path, name):
    command = [sys.executable, str(ROOT / "sample.py"), f"--config={ROOT / 'configs/emoji_hart.py'}", "--prompt=x"]
    with output.owned_out(tmp_path / name):
        run = subprocess.run([*command, f"--out={tmp_path / name}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 75 and "belongs to a run that samples images on host" in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "first",
    ["", "3", "[1]", '{"run": 3, "batch_size": 1}', '{"run": {}, "batch_size": "x"}', '{"run": {}, "batch_size": 0}'],
)
def test_a_damaged_record_of_a_run_is_named(tmp_path, first):
    sample(tmp_path, "a dog", "a cat")
    path = tmp_path / "00000-pictures.jsonl"
    path.write_text("\n".join([first, *path.read_text().splitlines()[1:]]))
    with pytest.raises(UserError, match=r"00000-pictures\.jsonl: cannot be read"):
        sample(tmp_path, "a dog", "a cat", resume=True)


def test_a_record_names_files_beside_it_alone(tmp_path):
    sample(tmp_path, "a dog", "a cat")
    path = tmp_path / "00000-pictures.jsonl"
    path.write_text(path.read_text().replace("00001-a-cat.png", "../cat.png"))
    with pytest.raises(UserError, match="does not name files beside it"):
        sample(tmp_path, "a dog", "a cat", resume=True)


def test_models_that_differ_in_one_number_are_told_apart(tmp_path):
    model, settings = tiny_model(), SampleConfig()
    changed = jax.tree.map(np.copy, model.transformer)
    changed["layers"]["mlp"]["down"]["kernel"][-1, -1, -1] += 1
    (tmp_path / "text").mkdir()
    weights = tmp_path / "text" / "model.safetensors"
    weights.write_bytes(bytes(2**20 + 1))
    text = (tmp_path / "text", None)
    one = output.identity(model, settings, text)
    assert output.identity(tiny_model(), settings, text) == one
    assert output.identity(dataclasses.replace(model, transformer=changed), settings, text)["model"] != one["model"]
    weights.write_bytes(bytes(2**20) + b"x")
    other = output.identity(model, settings, text)
    assert other["model"] == one["model"] and other["text_encoder"] != one["text_encoder"]


def test_a_text_encoder_that_is_gone_is_named(tmp_path):
    class Experiment:
        text_encoder, system_prompt = str(tmp_path / "gone"), ""

    with pytest.raises(UserError, match=r"gone: no such folder; .* --text_encoder"):
        text_source(tiny_model(), Experiment())
    assert text_source(tiny_model(num_classes=3, context_tokens=1, disable_aln=False), Experiment())
