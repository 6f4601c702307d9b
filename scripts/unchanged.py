"""What one commit computes, as digests: `python scripts/unchanged.py record OUT`, run in a worktree of that commit.

    python scripts/unchanged.py compare OLD NEW       # records; exits with 1 where they differ

`scripts/unchanged.sh` runs both. Times and file formats are left out; values are compared to the last bit.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a 3D render of a red apple", "a flat icon of a dog", "a cartoon of a house", "a clip art drawing of a tree")
# A moved command is found by the name that the worktree has.
MOVED = {
    "hart_jax.convert": "hart_jax.checkpoints.convert",
}
# What results.json says of files, folders and versions, not of images.
ABOUT = (
    "checkpoint", "model", "settings", "text_encoder", "reference", "reference_digest", "networks", "weights",
    "software", "devices",
)  # fmt: skip


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-3000:]}")


def module(name: str) -> str:
    moved = MOVED.get(name)
    return moved if moved and Path(*moved.split(".")).exists() else name


def digest(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    head = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(head + array.view(np.uint8).tobytes()).hexdigest()[:16]


def pixels(folder: Path) -> dict[str, str]:
    return {path.name: digest(np.asarray(Image.open(path))) for path in sorted(folder.glob("*.png"))}


def records(file: Path) -> list[dict]:
    """Lines of metrics.jsonl; without what a clock or a counter of work says."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not any(part in k for part in ("time", "per_s", "flops"))} for line in lines
    ]


def results(content: object) -> object:
    """Of results.json, without fingerprints, paths and versions."""
    if not isinstance(content, dict):
        return content
    return {key: results(value) for key, value in content.items() if key not in ABOUT}


def make_images(folder: Path) -> None:
    """48 images of 64 px with captions: rings and bars of all colours."""
    rng, captions, (y, x) = np.random.default_rng(0), {}, np.mgrid[:64, :64] - 31.5
    for number in range(48):
        colour, radius, width = rng.integers(0, 256, 3), rng.uniform(8, 28), rng.uniform(3, 9)
        far = np.hypot(x, y) if number % 2 else np.abs(x * np.cos(number) + y * np.sin(number)) + radius
        image = np.where(np.abs(far - radius)[..., None] < width, colour, 255).astype(np.uint8)
        kind = ("bar", "ring")[number % 2]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / kind / f"{number:03}.png")
        captions[f"{number:03}"] = {"category": kind, "prompt": f"a {kind} of colour {colour.tolist()}"}
    (folder / "meta_data.json").write_text(json.dumps(captions))


def record(out: Path) -> None:
    out.mkdir(parents=True)
    keep = Path(os.environ["KEEP"])
    found: dict[str, object] = {}

    for seed in ("0", "1"):
        prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
        run("sample.py", "--config=configs/emoji_hart.py", f"--seed={seed}", f"--out={out}/images{seed}", *prompts)
        found[f"images of seed {seed}"] = pixels(out / f"images{seed}")

    make_images(out / "drawn")
    run("-m", module("hart_jax.data.shards"), "--source", f"{out}/drawn", "--out", f"{out}/shards")
    found["shards"] = (out / "shards" / "SHA256SUMS").read_text().splitlines()
    train = [f"--config.data.train={out}/shards", f"--config.data.test={out}/shards", "--config.train.steps=20"]
    train += ["--config.train.log_every=1", "--config.train.sample_every=10", "--config.train.batch_size=8"]
    run(
        "train.py", "--config=configs/emoji_hart.py", f"--workdir={out}/hart", *train,
        "--config.tokenizer_from=assets/emoji", "--config.text_encoder=assets/emoji/text_encoder",
    )  # fmt: skip
    run(
        "train.py", "--config=configs/emoji_tokenizer.py", f"--workdir={out}/tokenizer", *train,
        "--config.loss.perceptual=0.0", "--config.loss.adversarial_start=5",
    )  # fmt: skip
    for run_ in ("hart", "tokenizer"):
        found[f"20 steps of {run_}"] = records(out / run_ / "metrics.jsonl")
        found[f"grids of {run_}"] = {
            p.name: digest(np.asarray(Image.open(p))) for p in sorted((out / run_).rglob("*.png"))
        }

    write = (
        "from tests.parity.materialize import read_manifest as r, write_release as w; from pathlib import Path as P;"
    )
    run("-c", f"{write} w(r(P('tests/parity/cases/flags')), P('{out}/release'))")
    run("-m", module("hart_jax.convert"), "--source", f"{out}/release", "--out", f"{out}/converted")
    found["conversion"] = {
        str(file.relative_to(out / "converted")): {
            name: digest(tensor) for name, tensor in sorted(load_file(file).items())
        }
        for file in sorted((out / "converted").rglob("*.safetensors"))
    }

    wheel = next(keep.glob("efficientnet*.whl"))
    judge = [f"--reference={out}/shards", f"--efficientnet={wheel}", "--count=32"]
    for what in ("generation", "reconstruction"):
        run("evaluate.py", f"--what={what}", "--config=configs/emoji_hart.py", f"--out={out}/{what}", *judge)
        found[f"scores of {what}"] = results(json.loads((out / what / "results.json").read_text()))
    (out / "record.json").write_text(json.dumps(found, indent=1))


def compare(old: Path, new: Path) -> int:
    before, after = (json.loads((folder / "record.json").read_text()) for folder in (old, new))
    equal = {part: before[part] == after.get(part) for part in before}
    for part, same in equal.items():
        size = len(before[part])
        print(f"{'equal ' if same else 'DIFFER'}  {part} ({size} {'entry' if size == 1 else 'entries'})")
    return 0 if all(equal.values()) and before.keys() == after.keys() else 1


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]).resolve())
    else:
        sys.exit(compare(Path(sys.argv[2]), Path(sys.argv[3])))
