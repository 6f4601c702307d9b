"""docs/mjhq.md on a miniature of MJHQ-30K: the zip, InceptionV3 and CLIP in their published layouts, random weights."""

import json
import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.networks.random_inception import inception_tensors
from tests.evaluation.networks.test_clip import write_published as write_clip
from tests.sample_runs import ROOT, write_tiny

CATEGORIES, EACH = ("animals", "food"), 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_tiny(tmp_path_factory.mktemp("mjhq"))
    random, entries = np.random.default_rng(0), {}
    (folder / "mjhq").mkdir()
    with zipfile.ZipFile(folder / "mjhq" / "mjhq30k_imgs.zip", "w") as archive:
        for number in range(len(CATEGORIES) * EACH):
            name, category = f"{number:040x}", CATEGORIES[number % len(CATEGORIES)]
            entries[name] = {"category": category, "prompt": f"an image of a {('red', 'blue')[number // 2 % 2]} dog"}
            data = BytesIO()
            colours = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(colours).resize((32, 32)).save(data, "jpeg")
            archive.writestr(f"mjhq30k_imgs/{category}/{name}.jpg", data.getvalue())
    (folder / "mjhq" / "meta_data.json").write_text(json.dumps(entries))
    np.savez(folder / "pt_inception-2015-12-05.npz", **inception_tensors())
    write_clip(folder / "clip-vit")
    return folder


def evaluate(folder: Path, *flags: str) -> str:
    networks = ("--inception=pt_inception-2015-12-05.npz", "--resize=clean-fid", "--batch_size=20")
    command = [sys.executable, str(ROOT / "evaluate.py"), "--reference=mjhq", "--image_size=0", *networks, *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HART_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_the_zip_to_the_row(folder):
    table = evaluate(folder, "--what=generation", "--config=tiny.py", "--clip=clip-vit", "--out=scores")
    found = json.loads((folder / "scores" / "results.json").read_text())
    inception = found["scores"]["InceptionV3 resizing as clean-fid"]
    assert inception["distance"] == "FID" and inception["frechet_distance"] > 0 and inception["floor"]["pictures"] == 10
    assert {name: group["pictures"] for name, group in inception["by category"].items()} == dict.fromkeys(
        CATEGORIES, EACH
    )
    (clip,) = (scores for name, scores in found["scores"].items() if name.startswith("CLIP"))
    assert 0 <= clip["clip_score"] <= 100
    assert "| FID |" in table and "CLIP score, CLIP" in table and "| assets" not in table
    files = sorted((folder / "scores" / "pictures").glob("*.png"))
    assert sum("grid" not in path.name for path in files) == len(CATEGORIES) * EACH
