"""Draws pictures: `python sample.py --config=configs/emoji_hart.py --prompt="a 3D render of a red apple"`.

Writes one PNG per picture into --out (and a grid of several); prompt, seed, settings and model are in each PNG.
"""

import dataclasses
import json
import re
from pathlib import Path

from absl import flags
from tqdm import tqdm

from hart_jax import flags as hart_flags
from hart_jax.errors import UserError, run_cli
from hart_jax.experiment import HartExperiment, SampleConfig

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; may be given several times.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A text file with one prompt per line.")
_LABELS = flags.DEFINE_list("labels", [], "Classes to draw, for a class-conditional model: --labels=3,17.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Pictures of each prompt or label.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another picture.")
_CFG = flags.DEFINE_float("cfg", None, "Classifier-free guidance; 0 is none.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Codes kept at every scale; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability mass of the codes kept, in (0, 1].")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Divides the logits.")
_SMOOTH = flags.DEFINE_bool("smooth", None, "Smooth sampling: nicer to look at, worse in measurements.")
_DISCRETE_ONLY = flags.DEFINE_bool("discrete_only", None, "Leaves the continuous residual out.")
_ITERATIONS = flags.DEFINE_integer("masked_iterations", None, "Iterations of the last scale.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, a model folder or the released layout.")
_OUT = flags.DEFINE_string("out", "outputs", "Folder for the pictures, or the name of a new .png for a single one.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pictures drawn at a time.")


def settings(experiment: HartExperiment) -> SampleConfig:
    """The experiment's sampling settings with the command line's changes."""
    changes = {
        "cfg": _CFG.value,
        "top_k": _TOP_K.value,
        "top_k_late": _TOP_K.value,
        "top_p": _TOP_P.value,
        "temperature": _TEMPERATURE.value,
        "smooth": _SMOOTH.value,
        "discrete_only": _DISCRETE_ONLY.value,
        "masked_iterations": _ITERATIONS.value,
    }
    changed = dataclasses.replace(experiment.sample, **{k: v for k, v in changes.items() if v is not None})
    changed.check_vocabulary(experiment.tokenizer.vocab_size)
    return changed


def wishes(experiment: HartExperiment) -> list[str] | list[int]:
    """The prompts of the command line, or its labels for a class-conditional model."""
    classes, prompted = experiment.transformer.num_classes, _PROMPT.value or _PROMPTS_FILE.value is not None
    if classes:
        if prompted or not _LABELS.value:
            raise UserError(f"--config: a model of {classes} classes, not of prompts; give --labels=3,17")
        if not all(label.isdigit() and int(label) < classes for label in _LABELS.value):
            raise UserError(f"--labels={','.join(_LABELS.value)}: needs numbers from 0 to {classes - 1}")
        return [int(label) for label in _LABELS.value]
    if _LABELS.value:
        raise UserError("--labels: this config's model draws prompts, not classes; give --prompt")
    from hart_jax.text.prompts import check_prompts, read_prompts_file

    found = list(_PROMPT.value)
    if _PROMPTS_FILE.value is not None:
        found += read_prompts_file(_PROMPTS_FILE.value)
    if not found:
        raise UserError('nothing to draw: give --prompt="a flat icon of a dog" or --prompts_file=FILE')
    check_prompts(found)
    return found


def output_paths(asked: list[str] | list[int], count: int) -> tuple[list[Path], Path | None]:
    """A new file for each picture and, for several, for their grid. Numbers go on after those in the folder."""
    out = Path(_OUT.value)
    if out.suffix == ".png":
        if count > 1:
            raise UserError(f"--out={out}: {count} pictures need a folder, not one file")
        if out.exists():
            raise UserError(f"{out}: already exists; remove it or give another --out")
        return [out], None
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is not a folder")
    taken = [int(path.name[:5]) for path in out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")]
    first = max(taken, default=-1) + 1
    names = [re.sub(r"[^a-z0-9]+", "-", str(wish).lower()).strip("-")[:60] for wish in asked]
    paths = [
        out / f"{first + i:05d}-{name}.png" for i, name in enumerate(n for n in names for _ in range(_NUM_IMAGES.value))
    ]
    return paths, out / f"{first:05d}-grid.png" if count > 1 else None


def main() -> None:
    hart_flags.parse()
    experiment = hart_flags.experiment()
    if not isinstance(experiment, HartExperiment):
        raise UserError("--config: this config trains a tokenizer; give one with a transformer")
    for flag in (_NUM_IMAGES, _BATCH_SIZE):
        if flag.value < 1:
            raise UserError(f"--{flag.name}={flag.value}: must be 1 or more")
    asked, chosen = wishes(experiment), settings(experiment)
    count = len(asked) * _NUM_IMAGES.value
    paths, grid_path = output_paths(asked, count)
    # After the checks, so that a wrong flag is reported at once.
    from hart_jax.images import grid, save_png
    from hart_jax.sampling import Painter, check_model, load_model, use_compilation_cache

    use_compilation_cache()
    source = _CHECKPOINT.value or experiment.model
    model = load_model(source)
    check_model(model, experiment, source)
    painter = Painter(model, chosen, None if model.text_encoder else experiment.text_encoder)
    common = {"software": "hart_jax", "model": str(source), "seed": str(_SEED.value)}
    common["settings"] = json.dumps(dataclasses.asdict(chosen))
    kind = "label" if experiment.transformer.num_classes else "prompt"
    pictures = []
    with tqdm(total=count, unit="image", desc="drawing", disable=count == 1) as bar:
        for batch in painter.draw(asked, _NUM_IMAGES.value, _SEED.value, _BATCH_SIZE.value):
            for picture in batch:
                about = {kind: str(picture.wish), "index": str(picture.index), **common}
                save_png(paths[len(pictures)], picture.image, about)
                pictures.append(picture)
            bar.update(len(batch))
    if grid_path is not None:
        import numpy as np

        images = np.stack([picture.image for picture in pictures])
        tiles = grid(images, columns=min(8, count), captions=[str(picture.wish) for picture in pictures])
        save_png(grid_path, tiles, {f"{kind}s": json.dumps(asked), **common})
    print(grid_path or paths[0])


if __name__ == "__main__":
    run_cli(main)
