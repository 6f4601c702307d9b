"""What fewer scales cost, and what training on several lists costs: `python benchmarks/scale_lists.py --out FOLDER`.

A small model is trained on lists of 6, 5 and 4 scales at once (`transformer.scale_lists`), and one more on each list
alone, all for the same number of steps on images of shapes that are drawn here. Tokenizer and text encoder are those of
`assets/emoji`. A table says of each list: its loss on held-out images, of the model of all lists and of the one of this
list alone; the quality of the images of the former, by `evaluate.py` (with `--efficientnet`, docs/evaluation.md); and
the time of one. What is in FOLDER already is not computed again.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from hart_jax.checkpoints.load import load_model
from hart_jax.config import HartExperiment, read_experiment
from hart_jax.config.scale_lists import list_text
from hart_jax.data.pipeline import ImageSource
from hart_jax.data.shards import RecordSource, write_shards
from hart_jax.sampling.pipeline import Pipeline, use_compilation_cache
from hart_jax.text.conditioning import conditioner_of
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.training.hart_step import make_loss, tokens_at, tokens_of
from hart_jax.transformer.model import Hart

ROOT = Path(__file__).parent.parent
LISTS = ((1, 2, 3, 4, 6, 8), (1, 2, 4, 6, 8), (1, 2, 4, 8))
COLOURS = {
    "red": "#d8322b",
    "green": "#2e9e3f",
    "blue": "#2b59d8",
    "yellow": "#f0c419",
    "purple": "#8a3bb8",
    "black": "#202020",
}
SHAPES = ("circle", "square", "triangle", "ring")
TRAIN, TEST, TEST_BATCH = 2000, 400, 40
# Of the test captions, an image is made for so many.
SCORED = 200


def get_config() -> ConfigDict:
    """The experiment, as train.py takes it; folders and lists come on the command line."""
    tokenizer = dataclasses.asdict(read_experiment(ROOT / "configs" / "emoji_hart.py").tokenizer)
    return ConfigDict(
        {
            "tokenizer": tokenizer,
            "transformer": {
                "patch_nums": LISTS[0],
                "vocab_size": 1024,
                "latent_channels": 16,
                "context_tokens": 20,
                "context_dim": 384,
                "depth": 4,
                "width": 96,
                "heads": 3,
                "disable_aln": False,
                "sep_aln_pooling_mode": "avg",
                "attn_l2_norm": True,
                "diffusion": {"width": 96, "depth": 2, "batch_mul": 2},
            },
            "tokenizer_from": str(ROOT / "assets" / "emoji"),
            "text_encoder": str(ROOT / "assets" / "emoji" / "text_encoder"),
            "precompute_tokens": True,
            "loss": {"keep_counts": 1, "condition_top_k": 1024, "condition_top_p": 1.0},
            "optimizer": {
                "learning_rate": 1.5e-3,
                "muon_learning_rate": 6e-3,
                "warmup_steps": 50,
                "final_fraction": 0.03,
                "clip_norm": 1.0,
                "ema_decay": 0.99,
            },
            "mesh": {},
            "data": {"flip": False},
            "train": {"steps": 400, "batch_size": 16, "log_every": 25, "save_every": 100, "sample_every": 0},
            "sample": {"cfg": 1.5, "top_k": 20, "top_k_late": 20, "temperature": 0.8},
        }
    )


def drawn(random: np.random.Generator) -> tuple[Image.Image, str, str]:
    """An image of two shapes on a pale ground, its caption, and the upper one's shape."""
    size = 256
    ground, (upper, lower) = random.integers(225, 256, 3), random.choice(SHAPES, 2)
    image = Image.new("RGB", (size, size), tuple(int(part) for part in ground))
    words = []
    for place, shape in enumerate((upper, lower)):
        colour, large = random.choice(list(COLOURS)), random.random() < 0.5
        radius = size * (0.2 if large else 0.11)
        x, y = size * random.uniform(0.3, 0.7), size * (0.27 + 0.46 * place)
        box = [x - radius, y - radius, x + radius, y + radius]
        canvas, fill = ImageDraw.Draw(image), COLOURS[colour]
        if shape == "circle":
            canvas.ellipse(box, fill=fill)
        elif shape == "ring":
            canvas.ellipse(box, outline=fill, width=int(0.4 * radius))
        elif shape == "square":
            canvas.rectangle(box, fill=fill)
        else:
            canvas.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=fill)
        words.append(f"{'large' if large else 'small'} {colour} {shape}")
    return image.resize((64, 64), Image.Resampling.LANCZOS), f"a {words[0]} above a {words[1]}", upper


def make_shards(out: Path) -> None:
    for name, count, seed in (("train", TRAIN, 0), ("test", TEST, 1)):
        if (out / name / "shards").exists():
            continue
        random, entries = np.random.default_rng(seed), {}
        for number in range(count):
            image, prompt, upper = drawn(random)
            path = out / name / "source" / upper / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            entries[path.stem] = {"category": upper, "prompt": prompt}
        (out / name / "source" / "meta_data.json").write_text(json.dumps(entries))
        write_shards(out / name / "source", out / name / "shards")


def flags_of(out: Path, scales: tuple[int, ...] | None, steps: int) -> list[str]:
    """Of train.py: the model of all lists, or of one alone, whose scales stand for the same ones of the first list."""
    flags = [f"--config={Path(__file__)}", f"--config.data.train={out / 'train' / 'shards'}"]
    flags += [f"--config.data.test={out / 'test' / 'shards'}", f"--config.train.steps={steps}"]
    if scales is None:
        return [*flags, f"--config.transformer.scale_lists={LISTS[1:]}"]
    if scales == LISTS[0]:
        return flags
    experiment = read_experiment(Path(__file__))
    assert isinstance(experiment, HartExperiment)
    levels = experiment.transformer.of_list(scales).levels
    parts = itertools.product(("tokenizer", "transformer"), (("patch_nums", scales), ("levels", levels)))
    return flags + [f"--config.{part}.{name}={value}" for part, (name, value) in parts]


def call(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def train(out: Path, workdir: Path, scales: tuple[int, ...] | None, steps: int, caches: Path | None = None) -> None:
    """Does nothing where the run is over. What was computed ahead in `caches`, another run's workdir, is taken."""
    for name in ("text_states", "tokens") if caches else ():
        shutil.copytree(caches / name, workdir / name, dirs_exist_ok=True)
    call(ROOT / "train.py", *flags_of(out, scales, steps), f"--workdir={workdir}")


def held_out_losses(workdir: Path, scales: tuple[int, ...], shards: Path) -> dict[str, float]:
    """Losses of a model's averages on the test images in this list, all tokens of the last scale taken, and with the
    same draws for every model: the diffusion loss has noise."""
    model, experiment = load_model(workdir), read_experiment(Path(__file__))
    assert isinstance(experiment, HartExperiment)
    config = model.transformer_config
    if config.patch_nums != scales:
        config = config.of_list(scales)
    tokenizer = Tokenizer(dataclasses.replace(model.tokenizer_config, patch_nums=scales, levels=config.levels))
    compute = make_loss(Hart(config), experiment.loss)
    conditioner = conditioner_of(config, model.text_encoder)
    images, records = ImageSource(shards, experiment.tokenizer.image_size), RecordSource(shards)
    kept_BN = jnp.tile(jnp.arange(config.sizes[-1]), (TEST_BATCH, 1))

    @jax.jit
    def losses(params: Any, encoding: Any, image_BHWC: jax.Array, condition: Any, key: jax.Array) -> Any:
        tokens, key_B = tokens_of(tokenizer, encoding, image_BHWC), jax.random.split(key, TEST_BATCH)
        _, metrics = compute(params, tokens, condition, encoding["quantizer"]["codebook"], kept_BN, key_B)
        return {name: metrics[name] for name in ("loss", "loss_token", "loss_diffusion")}

    params, found = (model.transformer, model.tokenizer), []
    for start in range(0, TEST, TEST_BATCH):
        numbers = range(start, start + TEST_BATCH)
        batch = np.stack([images[number]["image"] for number in numbers])
        condition = conditioner([records[number]["prompt"] for number in numbers])
        found.append(jax.device_get(losses(*params, batch, condition, jax.random.key(start))))
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def share_of_other_codes(shards: Path, scales: tuple[int, ...]) -> dict[str, float]:
    """Of the codes in this list made from tokens of the first one, those that are not the image's own: with `f_rest` in
    float32 and as it is kept on disk. And the largest difference of the latents."""
    model = load_model(ROOT / "assets" / "emoji")
    config, params, source = model.tokenizer_config, model.tokenizer, ImageSource(shards, 64)
    base, other = Tokenizer(config), Tokenizer(config.of_list(scales))
    images = np.stack([source[number]["image"] for number in range(TEST_BATCH)])

    @jax.jit
    def made(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        exact, ahead = (tokens_of(each, params, images) for each in (other, base))
        latents = [each.apply({"params": params}, x, method="latent") for each, x in ((other, exact), (base, ahead))]
        found = {"latent": jnp.max(jnp.abs(latents[0] - latents[1]))}
        for kind in (jnp.float32, jnp.float16):
            kept = ahead.replace(f_rest_BPC=ahead.f_rest_BPC.astype(kind).astype(jnp.float32))
            again = tokens_at(other, base, params, kept)
            differs = [a != b for a, b in zip(again.indices, exact.indices, strict=True)]
            found[jnp.dtype(kind).name] = jnp.mean(jnp.concatenate(differs, axis=1))
        return found

    return {name: float(value) for name, value in made(params, images).items()}


def seconds_of_one(workdir: Path, repeats: int) -> dict[tuple[int, ...], float]:
    """Medians of the seconds of one image, eight at a time, the lists taking turns."""
    model = load_model(workdir)
    pipes = {scales: Pipeline(model, dataclasses.replace(model.sample_config, scales=scales)) for scales in LISTS}
    prompts = ["a large red circle above a small blue square"]
    times: dict[tuple[int, ...], list[float]] = {scales: [] for scales in LISTS}
    for repeat, (scales, pipe) in itertools.product(range(repeats + 1), pipes.items()):
        started = time.perf_counter()
        pipe(prompts, seed=repeat, num_images=8)
        if repeat:
            times[scales].append((time.perf_counter() - started) / 8)
    return {scales: float(np.median(each)) for scales, each in times.items()}


def quality(out: Path, workdir: Path, scales: tuple[int, ...], steps: int, efficientnet: str) -> float:
    """Frechet distance to the test images, of one image for each of some of their captions."""
    scores = out / f"scores_{len(scales)}"
    flags = [*flags_of(out, None, steps), f"--checkpoint={workdir}", f"--scales={list_text(scales)}", "--by="]
    flags += [f"--count={SCORED}"]
    call(ROOT / "evaluate.py", "--what=generation", *flags, f"--efficientnet={efficientnet}", f"--out={scores}")
    (found,) = json.loads((scores / "results.json").read_text())["scores"].values()
    return found["frechet_distance"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder of data, workdirs and scores.")
    parser.add_argument("--steps", type=int, default=400, help="Of every training.")
    parser.add_argument("--efficientnet", default="", help="Weights of EfficientNet-Lite0; empty: no quality.")
    parser.add_argument("--repeats", type=int, default=5, help="Of the timing.")
    arguments = parser.parse_args()
    use_compilation_cache()
    out, steps = arguments.out.absolute(), arguments.steps
    make_shards(out)
    together = out / f"together_{steps}"
    train(out, together, None, steps)
    alone = {scales: out / f"alone_{len(scales)}_{steps}" for scales in LISTS}
    for scales, workdir in alone.items():
        train(out, workdir, scales, steps, together)
    losses_of = functools.partial(held_out_losses, shards=out / "test" / "shards")
    seconds = seconds_of_one(together, arguments.repeats)
    for scales in LISTS[1:]:
        print(f"{list_text(scales)} from kept tokens: {share_of_other_codes(out / 'test' / 'shards', scales)}")
    print("\n| scales | tokens | loss, all lists | loss, this list alone | ratio | Frechet distance | ms an image |")
    print("|---|---|---|---|---|---|---|")
    for scales in LISTS:
        ours, theirs = losses_of(together, scales), losses_of(alone[scales], scales)
        efficientnet = arguments.efficientnet
        frechet = f"{quality(out, together, scales, steps, efficientnet):.4g}" if efficientnet else ""
        row = list_text(scales), sum(side * side for side in scales), f"{ours['loss']:.4f}", f"{theirs['loss']:.4f}"
        print(f"| {' | '.join(map(str, row))} | {ours['loss'] / theirs['loss'] - 1:+.2%} | {frechet} |", end="")
        print(f" {1000 * seconds[scales]:.1f} |", flush=True)
        for name in ("loss_token", "loss_diffusion"):
            print(f"  {name}: {ours[name]:.4f} and {theirs[name]:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
