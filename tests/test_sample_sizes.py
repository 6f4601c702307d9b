"""`sample.py` and pipelines at other sizes than the model's: flags, lines of a file, and one clear error for each size
that is none."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hart_jax.config import HartExperiment, Shape, read_experiment
from hart_jax.config.sizes import image_shape_of
from hart_jax.errors import UserError
from hart_jax.io.images import read_png_metadata
from hart_jax.sampling import memory, pipeline
from tests.sample_runs import ROOT, sample, write_tiny

# Height and width of the images of a batch, and how many they are.
Programs = list[tuple[Shape, int]]
LINES = (
    {"prompt": "a red apple", "size": "12x6"},
    {"prompt": "a blue dog"},
    {"prompt": "a render of a dog", "seed": 7, "size": "2:1"},
    {"prompt": "3d apples", "size": "8x8"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("sizes"))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return folder


@pytest.fixture
def programs(monkeypatch) -> Programs:
    """Of what was sampled, batch by batch."""
    found: Programs = []
    make = pipeline.make_sampler

    def make_sampler(hart, tokenizer, *more):
        sampler = make(hart, tokenizer, *more)

        def run(params, condition, seeds, indices, numbers):
            found.append((tokenizer.config.image_shape, len(seeds)))
            return sampler(params, condition, seeds, indices, numbers)

        return run

    monkeypatch.setattr(pipeline, "make_sampler", make_sampler)
    return found


def run_sample(folder: Path, *flags: str) -> tuple[int, str, str]:
    return sample(folder, f"--config={folder / 'tiny.py'}", *flags)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_each_line_of_a_file_has_its_size(folder, tmp_path, programs):
    """One program serves all images of a size, and files are numbered as the lines are."""
    out = tmp_path / "out"
    asked = [f"--prompts_file={folder / 'prompts.jsonl'}", "--num_images=2", f"--out={out}"]
    code, printed, err = run_sample(folder, *asked)
    assert code == 0 and "8/8" in err, err
    assert sorted(set(programs)) == [((6, 12), 4), ((8, 8), 4)] and len(programs) == 2
    assert printed.strip() == str(out / "00000-grid.png")
    names = ["a-red-apple", "a-blue-dog", "a-render-of-a-dog", "3d-apples"]
    paths = [out / f"{number:05d}-{names[number // 2]}.png" for number in range(8)]
    for number, path in enumerate(paths):
        size, seed = ("8x8", "12x6")[number // 2 % 2 == 0], (0, 7)[number // 2 == 2]
        about = read_png_metadata(path)
        assert (about["prompt"], about["index"]) == (LINES[number // 2]["prompt"], str(number % 2))
        assert (about["size"], about["seed"]) == (size, str(seed))
        assert "x".join(map(str, Image.open(path).size)) == size
    record = [json.loads(line) for line in (out / "00000-pictures.jsonl").read_text().splitlines()[1:]]
    assert [line.get("size") for line in record] == ["12x6", "12x6", None, None] * 2


@pytest.mark.slow
def test_a_run_of_several_sizes_goes_on(folder, tmp_path, programs):
    """What an interruption left out is sampled again, in the batches of before, and nothing else is."""
    out = tmp_path / "out"
    asked = [f"--prompts_file={folder / 'prompts.jsonl'}", "--num_images=2", f"--out={out}"]
    code, _, err = run_sample(folder, *asked)
    assert code == 0, err
    whole = contents(out)
    for name in ("00001-a-red-apple.png", "00004-a-render-of-a-dog.png", "00000-grid.png"):
        (out / name).unlink()
    programs.clear()
    code, _, err = run_sample(folder, *asked, "--resume")
    assert code == 0 and contents(out) == whole, err
    assert programs == [((6, 12), 4)]
    # The same prompts at other sizes are another run.
    other = folder / "other.jsonl"
    other.write_text((folder / "prompts.jsonl").read_text().replace("2:1", "6x12"))
    code, _, err = run_sample(folder, f"--prompts_file={other}", *asked[1:], "--resume")
    assert code == 2 and "it has other prompts, seeds, sizes or numbers of images" in err
    assert contents(out) == whole


@pytest.mark.slow
def test_a_size_of_the_command_line(folder, tmp_path, programs):
    """As a ratio or in pixels, for all lines that have none; in Python it gives the same images."""
    lines = [{"prompt": "a red apple", "seed": 3}, {"prompt": "a blue dog", "seed": 3, "size": "2:1"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = {
        "size": [f"--prompts_file={tmp_path / 'lines.jsonl'}", "--size=12x6"],
        "ratio": ["--prompt=a red apple", "--prompt=a blue dog", "--seed=3", "--aspect_ratio=2:1"],
    }
    for name, flags in given.items():
        code, _, err = run_sample(folder, *flags, "--num_images=2", f"--out={tmp_path / name}")
        assert code == 0, err
    assert programs == [((6, 12), 4)] * 2
    names = [path.name for path in sorted((tmp_path / "size").glob("*-a-*.png"))]
    assert len(names) == 4
    size, ratio = (np.stack([np.asarray(Image.open(tmp_path / out / name)) for name in names]) for out in given)
    assert size.shape == (4, 6, 12, 3) and read_png_metadata(tmp_path / "ratio" / names[3])["size"] == "12x6"
    np.testing.assert_array_equal(ratio, size)
    pipe = pipeline.load(folder / "model", top_k=8, top_k_late=8)
    images = pipe(["a red apple", "a blue dog"], seed=3, num_images=2, size=(12, 6))
    np.testing.assert_array_equal(images, size)


WRONG = {
    "no multiple": (["--size=9x12"], "size 9x12: height and width must be multiples of 2 px; give 8x12 or 10x12"),
    "too small": (["--size=4x2"], "size 4x2: too small for the 3 scales of the model; give 6x4 or more"),
    "beyond 4:1": (["--size=4x20"], "size 4x20: at most 4:1 is possible, high or wide"),
    "a ratio beyond 4:1": (["--aspect_ratio=5:1"], "ratio 5:1: at most 4:1 is possible, high or wide"),
    "both": (["--size=12x6", "--aspect_ratio=2:1"], "--aspect_ratio: a --size has a ratio already; give one of them"),
    "no size": (["--size=large"], "size 'large': write WIDTHxHEIGHT in pixels, like 768x1152, or a ratio like 2:3"),
    "no ratio": (["--aspect_ratio=12x6"], "ratio '12x6': write it as width:height in whole numbers, like 2:3"),
    "as other programs have it": (["--width=12"], "there is no --width; width and height are --size=WIDTHxHEIGHT"),
    "too large": (["--size=800000x800000"], "size 800000x800000: one image takes 95,"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_size_is_one_clear_error_and_nothing_is_written(case, folder, tmp_path, programs):
    flags, message = WRONG[case]
    code, _, err = run_sample(folder, "--prompt=a red apple", *flags, f"--out={tmp_path / 'out'}")
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert not programs and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("9x12", "size 9x12: height and width must be multiples of 2 px"),
        ("2:3:4", "ratio '2:3:4': write it as width:height"),
        ("1:5", "ratio 1:5: at most 4:1 is possible"),
        ("800000x800000", "size 800000x800000: one image takes 95,"),
    ],
)
def test_a_line_with_no_size_of_the_model_is_one_clear_error(size, message, folder, tmp_path, programs):
    lines = [{"prompt": "a blue dog"}, {"prompt": "a red apple", "size": size}]
    (folder / "wrong.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, err = run_sample(folder, f"--prompts_file={folder / 'wrong.jsonl'}", f"--out={tmp_path / 'out'}")
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert not programs and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "gib", "fits"),
    [("1024x1024", 6, True), ("1360x768", 6, True), ("4096x4096", 14, False), ("8192x8192", 141, False)],
)
def test_a_size_that_the_released_model_cannot_hold(size, gib, fits):
    """Known before anything is compiled; `gib` are those that a device has left beside the weights."""
    released = read_experiment(ROOT / "configs" / "hart_0p7b_1024.py")
    assert isinstance(released, HartExperiment)
    height, width = image_shape_of(size, released.tokenizer)
    factor = released.tokenizer.downsampling
    configs = [part.of_latent(height // factor, width // factor) for part in (released.transformer, released.tokenizer)]
    stats = {"bytes_limit": gib * 2**30, "bytes_in_use": 0}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    if fits:
        memory.check_memory(*configs, jnp.bfloat16, device)
        return
    with pytest.raises(UserError, match=rf"^size {size}: one image takes \S+ GiB or more, and {gib}.0 GiB are free; "):
        memory.check_memory(*configs, jnp.bfloat16, device)
