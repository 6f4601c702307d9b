"""Samples images: `python sample.py --checkpoint=assets/emoji --prompt="a 3D render of a red apple"`.

A model brings its sampling settings along. Those of --config come before them, and flags before both: a flag without a
default below is what the model says.

Writes one PNG per image into --out (and a grid of several); prompt, seed, settings and model are in each PNG. While a
run writes into a folder, another one is refused. Exits with 3 where --prompt_filter refused a prompt; the others are
sampled.
"""

import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from hart_jax import flags as hart_flags
from hart_jax.config import WEIGHTS, Experiment, HartExperiment, SampleConfig, Shape
from hart_jax.config.scale_lists import parse_scales
from hart_jax.config.sizes import image_shape_of, one_size
from hart_jax.errors import UserError, run_cli
from hart_jax.io.paths import as_path

if TYPE_CHECKING:
    from hart_jax.sampling.pipeline import SampleRequest

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to sample; may be given several times.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file",
    None,
    'A prompt or SEED<tab>prompt per line, # is no comment; of a .jsonl, {"prompt": "x", "seed": 3, "size": "2:3"}.',
)
_LABELS = flags.DEFINE_list("labels", [], "Classes to sample, for a class-conditional model: --labels=3,17.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Images of each prompt or label.")
_SIZE = flags.DEFINE_string("size", None, "Width x height in pixels, like 768x1152, instead of the model's own size.")
_ASPECT_RATIO = flags.DEFINE_string(
    "aspect_ratio", None, "Width to height, like 2:3, at about the model's own number of pixels."
)
_SCALES = flags.DEFINE_string(
    "scales", None, "Scales to sample in: how many, like 5, or their sides in tokens, like 1,2,4,8."
)
_UNTRAINED_SCALES = flags.DEFINE_bool("untrained_scales", False, "--scales may be ones that the model never saw.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another image.")
_CFG = flags.DEFINE_float("cfg", None, "Classifier-free guidance; 0 is none.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Codes kept at every scale; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Probability mass of the codes kept, in (0, 1].")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Divides the logits.")
_SMOOTH = flags.DEFINE_bool("smooth", None, "Smooth sampling: nicer to look at, worse in measurements.")
_DISCRETE_ONLY = flags.DEFINE_bool("discrete_only", None, "Leaves the continuous residual out.")
_ITERATIONS = flags.DEFINE_integer("masked_iterations", None, "Iterations of the last scale.")
_WEIGHTS = flags.DEFINE_enum("weights", None, WEIGHTS, "int8: transformer and text encoder in a quarter of the memory.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A training workdir, a model folder or the released layout.")
_CACHE = flags.DEFINE_bool("cache", True, "Keeps the converted weights of a release for the next time.")
_TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Folder of the text encoder, instead of the model's own.")
_SYSTEM_PROMPT = flags.DEFINE_string("system_prompt", None, "File of the text encoder's system prompt.")
_FILTER = flags.DEFINE_string("prompt_filter", "off", "Folder of a classifier that refuses prompts, or off.")
_ALLOWS = flags.DEFINE_list("prompt_filter_allows", [], "The classifier's labels that let a prompt through.")
_OUT = flags.DEFINE_string("out", "outputs", "Folder for the images, or the name of a new .png for a single one.")
_RESUME = flags.DEFINE_bool("resume", False, "Goes on with an interrupted run of this command in --out.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images sampled at a time, halved where they do not fit; 0: eight.")

# Of flags that other programs have.
_INSTEAD = {
    "guidance": "the strength of guidance is --cfg",
    "guidance_scale": "the strength of guidance is --cfg",
    "negative_prompt": "a negative prompt is given from Python: docs/api.md",
    "width": "width and height are --size=WIDTHxHEIGHT",
    "height": "width and height are --size=WIDTHxHEIGHT",
    "output": "the folder or file to write is --out",
    "model": "the model is --checkpoint",
}


def read_experiment_of(checkpoint: str) -> HartExperiment:
    from hart_jax.checkpoints import load

    return load.read_experiment_of(checkpoint)


def described() -> Experiment:
    """The experiment of --config, or without one what the model of --checkpoint says of itself."""
    if hart_flags.given():
        return hart_flags.experiment()
    if not _CHECKPOINT.value:
        raise UserError("no model: give --checkpoint=FOLDER, like --checkpoint=assets/emoji, or --config=FILE")
    return read_experiment_of(_CHECKPOINT.value)


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
        "weights": _WEIGHTS.value,
        "scales": None if _SCALES.value is None else parse_scales(_SCALES.value),
    }
    changed = dataclasses.replace(experiment.sample, **{k: v for k, v in changes.items() if v is not None})
    changed.check_fits(experiment.tokenizer)
    if not changed.scales:
        return changed
    # The model itself knows what it was trained on.
    model = read_experiment_of(_CHECKPOINT.value or experiment.model)
    return changed.of_model(model.transformer, _UNTRAINED_SCALES.value)


class Wanted(NamedTuple):
    """A prompt, or label, with its seed and with the height and width of its images, None for the model's own."""

    prompt: str | int
    seed: int
    shape: Shape | None


def requested(experiment: HartExperiment) -> list[Wanted]:
    """The prompts of the command line, or its labels for a class-conditional model; sizes are those of its scales."""
    classes, prompted = experiment.transformer.num_classes, _PROMPT.value or _PROMPTS_FILE.value is not None
    size = one_size(_SIZE.value, _ASPECT_RATIO.value)
    if classes:
        if prompted or not _LABELS.value:
            raise UserError(f"--config: a model of {classes} classes, not of prompts; give --labels=3,17")
        if not all(re.fullmatch("[0-9]{1,9}", label) and int(label) < classes for label in _LABELS.value):
            raise UserError(f"--labels={','.join(_LABELS.value)}: needs numbers from 0 to {classes - 1}")
        return [Wanted(int(label), _SEED.value, other_shape(size, experiment)) for label in _LABELS.value]
    if _LABELS.value:
        raise UserError("--labels: this config's model takes prompts, not classes; give --prompt")
    from hart_jax.text.prompts import PromptLine, check_prompts, read_prompt_lines

    found = [PromptLine(prompt) for prompt in _PROMPT.value]
    if _PROMPTS_FILE.value is not None:
        found += read_prompt_lines(_PROMPTS_FILE.value)
    if not found:
        raise UserError('nothing to sample: give --prompt="a flat icon of a dog" or --prompts_file=FILE')
    check_prompts([line.prompt for line in found])
    return [
        Wanted(
            line.prompt,
            _SEED.value if line.seed is None else line.seed,
            other_shape(size if line.size is None else line.size, experiment),
        )
        for line in found
    ]


def other_shape(size: str | None, experiment: HartExperiment) -> Shape | None:
    """Height and width of a size; None for the model's own."""
    shape = image_shape_of(size, experiment.tokenizer)
    return None if shape == experiment.tokenizer.image_shape else shape


def allowed(requests: list[Wanted]) -> list[Wanted]:
    """Those that --prompt_filter lets through; the others are named."""
    if _FILTER.value == "off":
        return requests
    from hart_jax.text.prompt_filter import load_prompt_filter

    is_allowed = load_prompt_filter(_FILTER.value, _ALLOWS.value)
    kept = [one for one in requests if is_allowed(str(one.prompt))]
    through = {one.prompt for one in kept}
    for one in requests:
        if one.prompt not in through:
            print(f"refused by --prompt_filter, not sampled: {one.prompt!r}", file=sys.stderr)
    return kept


def main() -> None:
    hart_flags.parse(instead=_INSTEAD)
    experiment = described()
    if not isinstance(experiment, HartExperiment):
        raise UserError("--config: this config trains a tokenizer; give one with a transformer")
    for flag, least in ((_NUM_IMAGES, 1), (_BATCH_SIZE, 0)):
        if flag.value < least:
            raise UserError(f"--{flag.name}={flag.value}: must be {least} or more")
    chosen, out = settings(experiment), as_path(_OUT.value, "--out")
    given = requested(dataclasses.replace(experiment, sample=chosen).sampled())
    for one in given:
        if not 0 <= one.seed < 2**32:
            raise UserError(f"seed {one.seed}: must be from 0 to 2**32 - 1")
    # After the checks, so that a wrong flag is reported at once.
    from hart_jax.parallel.launch import check_devices
    from hart_jax.sampling import output
    from hart_jax.sampling.pipeline import SampleRequest, check_text, use_compilation_cache

    output.check_out(out, len(given) * _NUM_IMAGES.value, _RESUME.value)
    check_text(_TEXT_ENCODER.value, _SYSTEM_PROMPT.value)
    kept = allowed(given)
    requests = [
        SampleRequest(one.prompt, one.seed, index, shape=one.shape)
        for one in kept
        for index in range(_NUM_IMAGES.value)
    ]
    if requests:
        check_devices()
        use_compilation_cache()
        with output.owned_out(out):
            print(sample_images(experiment, chosen, requests, out))
    sys.exit(3 if len(kept) < len(given) else 0)


def sample_images(experiment: HartExperiment, chosen: SampleConfig, requests: "list[SampleRequest]", out: Path) -> Path:
    """Samples the images; gives the path of their grid, of the only one, or of their folder."""
    from hart_jax.checkpoints.load import check_model, load_model
    from hart_jax.sampling import output
    from hart_jax.sampling.pipeline import Pipeline, text_source

    source = _CHECKPOINT.value or experiment.model
    model = load_model(source, cache=_CACHE.value)
    check_model(model, experiment, source)
    text = text_source(model, experiment, _TEXT_ENCODER.value, _SYSTEM_PROMPT.value)
    # A single image has no record of its run.
    about = output.identity(model, chosen, text) if len(requests) > 1 or _RESUME.value else {}
    pipe = Pipeline(model, chosen, *text, mesh=experiment.mesh, untrained_scales=_UNTRAINED_SCALES.value)
    # The pipeline has its own copy.
    del model
    for shape in {request.shape for request in requests}:
        pipe.prepare(shape)
    size_of = functools.partial(pipe.batch_size, len(requests))
    output_run = output.open_run(out, requests, about, _BATCH_SIZE.value, size_of, _RESUME.value)
    kind = "label" if experiment.transformer.num_classes else "prompt"
    common = {"software": "hart_jax", "model": str(source), "settings": json.dumps(chosen.to_dict())}
    output.sample_to_folder(pipe, output_run, requests, kind, common)
    return output_run.grid or (output_run.paths[0] if len(output_run.paths) == 1 else out)


if __name__ == "__main__":
    run_cli(main)
