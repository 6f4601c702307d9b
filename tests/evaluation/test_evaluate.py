"""`evaluate.py` from beginning to end, on tiny models and scored by a small network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_jax.io.images import read_png_metadata
from tests.evaluation.evaluation_runs import ROOT, run
from tests.sample_runs import write_config, write_tiny
from tests.tiny import TOKENIZER, transformer_config

EMOJI = ROOT / "tests" / "emoji"
GENERATION = ("--what=generation", "--config=tiny.py", f"--reference={EMOJI}", "--by=style", "--inception=One")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("evaluate"))


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run that nothing disturbed, of every kind of score."""
    code, out, err = run(folder, *GENERATION, "--efficientnet=Two", "--clip=x", "--out=whole")
    assert code == 0, err
    assert "warning: only 24 sampled images" in err and "| images of |" in out
    return folder / "whole"


def test_an_image_is_sampled_for_every_caption_and_scored(whole):
    found = results(whole)
    entries = json.loads((EMOJI / "meta_data.json").read_text())
    files = sorted((whole / "pictures").glob("*.png"))
    sampled = [read_png_metadata(path)["prompt"] for path in files if "grid" not in path.name]
    assert sampled == [entries[name]["prompt"] for name in sorted(entries)]
    assert found["pictures"] == found["reference_pictures"] == len(entries)
    assert (found["smooth"], found["discrete_only"], found["image_size"]) == (False, False, 8)
    assert set(found["scores"]) == {"One", "Two", "CLIP"}
    one = found["scores"]["One"]
    assert one["distance"] == "Frechet distance, One" and one["frechet_distance"] > one["floor"]["frechet_distance"]
    assert set(one["alignment"]) == {"concept", "style"} and "alignment" not in found["scores"]["Two"]
    assert 1 <= one["inception_score"] <= 4 and 0 <= found["scores"]["CLIP"]["clip_score"] <= 100
    table = (whole / "results.md").read_text()
    assert "Frechet distance, One" in table and "FID" not in table and "right style at 1" in table
    for board in ("drawn.png", "by_style.png"):
        assert np.asarray(Image.open(whole / board)).std() > 0


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(folder, whole):
    stopped = folder / "stopped"
    shutil.copytree(whole, stopped)
    (stopped / "results.json").unlink()
    shutil.rmtree(stopped / "kept")
    files = sorted((stopped / "pictures").glob("*-a-*.png"))
    kept = {path.name: path.stat().st_mtime_ns for path in files[3:]}
    for path in files[:3]:
        path.unlink()
    code, _, err = run(folder, *GENERATION, "--efficientnet=Two", "--clip=x", "--out=stopped")
    assert code == 0, err
    assert {name: (stopped / "pictures" / name).stat().st_mtime_ns for name in kept} == kept
    for path in (whole / "pictures").glob("*.png"):
        assert (stopped / "pictures" / path.name).read_bytes() == path.read_bytes()
    assert results(stopped) == results(whole)


@pytest.mark.slow
def test_two_processes_agree_with_one(folder, whole):
    code, _, err = run(folder, *GENERATION, "--efficientnet=Two", "--clip=x", "--out=two", processes=2)
    assert code == 0, err
    one, two = results(whole), results(folder / "two")
    one.pop("devices"), two.pop("devices")

    def compare(left, right):
        if isinstance(left, dict):
            assert set(left) == set(right)
            for key in left:
                compare(left[key], right[key])
        elif isinstance(left, float):
            assert left == pytest.approx(right, rel=1e-6, abs=1e-6)
        else:
            assert left == right

    compare(one, two)


def test_settings_have_an_effect_and_another_run_is_not_overwritten(folder, whole):
    before = (whole / "results.json").read_bytes()
    code, _, err = run(folder, *GENERATION, "--config.sample.discrete_only=True", "--out=whole")
    assert code == 2 and "holds another evaluation" in err and "discrete_only is False there" in err
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    code, _, err = run(folder, *GENERATION, "--out=notes")
    assert (
        code == 2
        and "holds no evaluation" in err
        and [path.name for path in (folder / "notes").iterdir()] == ["mine.txt"]
    )
    assert (whole / "results.json").read_bytes() == before
    discrete = ("--config.sample.discrete_only=True", "--config.sample.smooth=True", "--count=20", "--out=discrete")
    code, out, err = run(folder, *GENERATION, *discrete, "--scales=2", "--untrained_scales")
    assert code == 0, err
    assert "scales 1,4, smooth, discrete only" in out and results(folder / "discrete")["pictures"] == 20
    assert results(folder / "discrete")["settings"]["scales"] == [1, 4]
    assert results(folder / "discrete")["reference_pictures"] == 24


def test_images_of_any_folder_are_scored(folder, tmp_path):
    compared = ("--what=pictures", f"--reference={EMOJI}", f"--pictures={EMOJI}", "--inception=One", "--image_size=16")
    code, _, err = run(folder, *compared, f"--out={tmp_path / 'same'}")
    assert code == 0, err
    same = results(tmp_path / "same")["scores"]["One"]
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert same["alignment"]["style"]["drawn"]["recall_at_1"] == 1 and "by category" in same
    anonymous = tmp_path / "anonymous"
    anonymous.mkdir()
    for number, path in enumerate(sorted(EMOJI.glob("*/*.png"))[:12]):
        shutil.copy(path, anonymous / f"{number}.png")
    compared = ("--what=pictures", f"--reference={EMOJI}", f"--pictures={anonymous}", "--image_size=16")
    code, _, err = run(folder, *compared, "--clip=x", f"--out={tmp_path / 'x'}")
    assert code == 2 and "needs a prompt for every image" in err
    code, _, err = run(folder, *compared, "--inception=One", f"--out={tmp_path / 'other'}")
    assert code == 0, err
    assert "alignment" not in results(tmp_path / "other")["scores"]["One"]


@pytest.mark.slow
def test_reconstructions_of_both_modes(folder):
    flags = ("--what=reconstruction", "--config=tiny.py", f"--reference={EMOJI}", "--inception=One")
    code, out, err = run(folder, *flags, "--out=rebuilt")
    assert code == 0, err
    found = results(folder / "rebuilt")
    discrete, hybrid = found["modes"]["discrete"], found["modes"]["hybrid"]
    # Images of 8 px are smaller than SSIM's window.
    assert hybrid["psnr"] != discrete["psnr"] and "ssim" not in hybrid
    assert discrete["One"]["distance"] == "rFrechet distance, One"
    codebook = found["codebook"]
    assert codebook["scales"] == [1, 2, 4] and all(0 < used <= 1 for used in codebook["used_of_codebook"])
    assert "| hybrid |" in out and (folder / "rebuilt" / "reconstructions.png").is_file()
    # Reconstructions of some are sought among all real images.
    code, out_of_some, err = run(folder, *flags, "--count=9", "--out=some")
    assert code == 0 and "right style at 1" in out_of_some, err
    few = results(folder / "some")
    assert few["pictures"] == 9
    assert few["modes"]["hybrid"]["One"]["alignment"] != hybrid["One"]["alignment"]
    compared = ("--what=pictures", f"--reference={EMOJI}", f"--pictures={EMOJI}", "--inception=One", "--image_size=8")
    code, _, err = run(folder, *compared, "--out=themselves")
    assert code == 0, err
    ceiling = results(folder / "themselves")["scores"]["One"]["alignment"]
    for attribute, recalls in hybrid["One"]["alignment"].items():
        assert recalls["real"] == ceiling[attribute]["real"]
        assert recalls["drawn"] != recalls["real"]
    code, again, err = run(folder, *flags, "--batch_size=5", "--out=rebuilt")
    assert code == 0, err
    assert again == out


@pytest.mark.slow
def test_reconstructions_of_rectangles(folder):
    """Higher than SSIM's window, and narrower."""
    tokenizer = TOKENIZER.of_latent(12, 4)
    transformer = transformer_config(context_tokens=6, context_dim=24).of_latent(12, 4)
    write_config(folder / "tall.py", transformer, tokenizer.to_dict(), model=str(folder / "model"))
    flags = ("--what=reconstruction", "--config=tall.py", f"--reference={EMOJI}", "--count=5", "--out=tall")
    code, out, err = run(folder, *flags)
    assert code == 0, err
    found = results(folder / "tall")
    assert found["image_size"] == [24, 8] and set(found["modes"]["hybrid"]) == {"psnr"}
    assert found["codebook"]["scales"] == tokenizer.to_dict()["patch_nums"]
    # Originals and both reconstructions of five, with two pixels around each.
    assert Image.open(folder / "tall" / "reconstructions.png").size == (2 + 5 * (8 + 2), 2 + 3 * (24 + 2))
    code, again, err = run(folder, *flags)
    assert code == 0 and again == out, err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--what=generation", "--out=x"), "--config is missing"),
        (("--what=generation", "--config=tiny.py", "--out=x"), "--reference is missing"),
        ((*GENERATION, "--count=99", "--out=x"), "--count=99: there are only 24 images"),
        ((*GENERATION, "--count=-1", "--out=x"), "--count=-1: must be 0 or more"),
        ((*GENERATION, "--checkpoint=none", "--out=x"), "none: no such folder"),
        ((*GENERATION, "--scales=2", "--out=x"), "scales: the model was not trained on 2 scales; it was on 1,2,4"),
        (("--what=reconstruction", *GENERATION[1:], "--scales=2", "--out=x"), "--scales=2: belongs to --what=gen"),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(folder, flags, message):
    code, _, err = run(folder, *flags)
    assert code == 2 and message in err and "Traceback" not in err, err
    assert not (folder / "x").exists()


def test_images_without_prompts_cannot_be_sampled(folder, tmp_path):
    shutil.copy(next(EMOJI.glob("*/*.png")), tmp_path)
    code, _, err = run(folder, *GENERATION[:2], f"--reference={tmp_path}", "--inception=One", "--out=x")
    assert code == 2 and "has no prompt to sample from" in err
