"""Makes an image for each caption of a set and says how good they are: what `evaluate.py --what=generation` does."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.checkpoints.class_names import normalized
from hart_jax.config import HartExperiment
from hart_jax.errors import UserError
from hart_jax.evaluation.concept_retrieval.recall import attributes_of, concept_recall
from hart_jax.evaluation.features import Evaluators
from hart_jax.evaluation.images import ImageFiles, ImageInfo, ImageSet
from hart_jax.evaluation.metrics.gather import gather_rows
from hart_jax.evaluation.networks.clip import clip_score
from hart_jax.evaluation.scores import by_group, compare, distance_name, real_vs_real, warnings_of
from hart_jax.parallel.agree import gather_texts
from hart_jax.parallel.mesh import first_process_first
from hart_jax.sampling import output
from hart_jax.sampling.pipeline import Pipeline, SampleRequest


def check_prompts(infos: Sequence[ImageInfo], categories: Sequence[str], experiment: HartExperiment) -> None:
    """Raises `UserError` where an image has no prompt, or for a class-conditional model no category, to sample from;
    or where there are more categories than classes."""
    classes = experiment.transformer.num_classes
    for info in infos:
        if not (info.category if classes else info.prompt):
            what = "category" if classes else "prompt"
            raise UserError(
                f"--reference: image {info.name!r} has no {what} to sample from; give shards or a folder "
                "with meta_data.json"
            )
    if classes and len(categories) > classes:
        raise UserError(f"--reference: has {len(categories)} categories, the model {classes} classes; leave some out")


def requests_of(
    infos: Sequence[ImageInfo], experiment: HartExperiment, names: Sequence[str], seed: int
) -> list[SampleRequest]:
    """What to sample for each: its prompt, or for a class-conditional model the label of its category.

    `names` are those of the model's classes, in the order of their labels, among which every category is. A prompt that
    comes again is sampled again: as the next image of the same seed.
    """
    classes, seen, requests = experiment.transformer.num_classes, Counter[str | int](), []
    label_of = {normalized(name): label for label, name in enumerate(names)}
    for info in infos:
        prompt = label_of[normalized(info.category)] if classes else info.prompt
        requests.append(SampleRequest(prompt, seed, seen[prompt]))
        seen[prompt] += 1
    return requests


def sample_images(
    pipe: Pipeline,
    experiment: HartExperiment,
    requests: Sequence[SampleRequest],
    infos: Sequence[ImageInfo],
    out: Path,
    batch_size: int,
    identity: Mapping[str, Any],
    source: str,
) -> ImageFiles:
    """An image for each request, in `out`; those that are there are kept, and processes share the rest.

    Args:
      infos: what is known of each, for the scores.
      identity: what the images depend on, from `output.identity`; `source` is the model's name in their metadata.

    Raises:
      UserError: `out` holds images of another model, other settings or prompts; or what `Pipeline` says.
      SystemExit: in every process, when a signal ended one of them early.
    """
    pipe.check([one.prompt for one in requests])

    def size_of(wanted: int) -> int:
        return pipe.batch_size(len(requests), wanted)

    output_run = first_process_first(lambda: output.open_run(out, requests, identity, batch_size, size_of, resume=True))
    index, count = jax.process_index(), jax.process_count()
    share = output.OutputRun(output_run.paths[index::count], output_run.batch_size, None)
    kind = "label" if experiment.transformer.num_classes else "prompt"
    common = {"software": "hart_jax", "model": source, "settings": json.dumps(experiment.sample.to_dict())}
    stopped = ""
    try:
        if share.paths:
            output.sample_to_folder(pipe, share, requests[index::count], kind, common, "the same command")
    except SystemExit as stop:
        stopped = str(stop.code)
    # All wait for each other here, and end together if one was stopped.
    codes = [code for code in gather_texts(stopped) if code]
    if codes:
        raise SystemExit(int(codes[0]))
    return ImageFiles(output_run.paths, out, infos)


def score_images(
    real: ImageSet,
    fake: ImageSet,
    own_N: np.ndarray | None,
    evaluators: Evaluators,
    *,
    by: str = "",
    keep: Path,
    seed: int = 0,
) -> dict[str, Any]:
    """All scores of the images `fake` against `real`, as `results.json` has them.

    Args:
      own_N: places in `real` of the images whose captions those of `fake` are; None where they are not known.
      by: an attribute, or "category", for whose values there are scores of their own.
      keep: folder for what the networks see of `fake`.
    """
    scores: dict[str, Any] = {}
    for number, one in enumerate(evaluators.extractors):
        ours, theirs = one.extract(fake, "samples", keep), one.extract(real, "real images")
        found: dict[str, Any] = {"distance": distance_name(one.network), "weights": one.network.digest}
        found |= compare(theirs, ours, seed)
        found["floor"] = real_vs_real(theirs, len(ours.features_NF), seed)
        if by:
            found[f"by {by}"] = by_group(theirs, ours, by)
        names = attributes_of(theirs) if own_N is not None and number == 0 else []
        if names and own_N is not None:
            blurred = one.extract(real, "real images", blurred=True)
            (found["alignment"],) = concept_recall(theirs, blurred, [ours], own_N, names, by, seed)
        scores[one.network.name] = found
    if evaluators.clip is not None:
        clip, clip_extractor = evaluators.clip
        rows = clip_extractor.rows(fake, "samples", keep)
        embedded = gather_rows(rows.columns["features"], rows.places_N)
        values = clip_score(embedded, clip.embed([info.prompt for info in fake.infos]))
        scores[clip.images.name] = {"clip_score": float(np.mean(values)), "weights": clip.images.digest}
    return {
        "pictures": len(fake.infos),
        "reference_pictures": len(real.infos),
        "reference_digest": real.digest,
        "scores": scores,
        "warnings": warnings_of({"sampled": len(fake.infos), "real": len(real.infos)}) if evaluators.extractors else [],
    }
