"""One evaluation from beginning to end: what `evaluate.py` calls."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.checkpoints.class_names import CLASSES, class_names, normalized
from hart_jax.checkpoints.load import check_model, load_model
from hart_jax.checkpoints.model_folder import Model
from hart_jax.checkpoints.workdir import load_tokenizer
from hart_jax.config import Experiment, HartExperiment, Scale
from hart_jax.config.scale_lists import list_text
from hart_jax.errors import UserError
from hart_jax.evaluation import report
from hart_jax.evaluation.features import Evaluators, FeatureExtractor, load_evaluators
from hart_jax.evaluation.generation import check_prompts, requests_of, sample_images, score_images
from hart_jax.evaluation.image_grids import save_group_grid, save_sample_grid
from hart_jax.evaluation.images import ImageInfo, ImageSet, Relabelled, Subset, open_images, random_subset
from hart_jax.evaluation.networks.inception import Resize
from hart_jax.evaluation.reconstruction import save_reconstruction_grid, score_reconstructions
from hart_jax.evaluation.scores import NEIGHBOURS
from hart_jax.io.fingerprint import weights_digest
from hart_jax.io.ownership import owned
from hart_jax.parallel.mesh import first_process_first
from hart_jax.sampling import output
from hart_jax.sampling.pipeline import Pipeline, text_source
from hart_jax.tokenizer.perceptual import load_lpips


@dataclasses.dataclass(frozen=True)
class Request:
    """What `evaluate.py` was asked for, flag by flag; `networks` are files of InceptionV3, EfficientNet-Lite0, CLIP."""

    what: str
    experiment: Experiment | None
    checkpoint: str
    text_encoder: str | None
    system_prompt: str | None
    reference: str
    images: str | None
    networks: tuple[str | None, str | None, str | None]
    resize: Resize
    lpips: str | None
    count: int
    seed: int
    image_size: int | None
    by: str
    by_given: bool
    batch_size: int
    draw_batch_size: int
    out: Path
    untrained_scales: bool = False

    def evaluators(self, size: Scale) -> Evaluators:
        return load_evaluators(*self.networks, size=size, batch_size=self.batch_size, resize=self.resize)


def evaluate(request: Request) -> tuple[str, list[str]]:
    """Carries it out; returns the Markdown table and what to be careful with.

    Raises:
      UserError: bad input, before anything is sampled or written; or `out` holds something else.
    """
    reference = open_images(request.reference)
    _check_by(request, reference)
    kinds = {"reconstruction": _reconstruction, "generation": _generation, "pictures": _images}
    with owned(request.out, "an evaluation"):
        table, results = kinds[request.what](request, reference)
    return table, results["warnings"]


def _check_by(request: Request, reference: ImageSet) -> None:
    """Raises `UserError` where --by was given, not left at its default, and no image has such an attribute."""
    if request.by_given and request.by and not any(info.value(request.by) for info in reference.infos):
        known = sorted({name for info in reference.infos for name in info.attributes})
        known += ["category"] if any(info.category for info in reference.infos) else []
        raise UserError(f"--by={request.by}: no image of --reference has it; they have {', '.join(known) or 'none'}")


def _check_enough(extractors: Sequence[FeatureExtractor], **counts: int) -> None:
    """Raises `UserError` where sets are too small for what is measured, before anything is sampled."""
    for name, count in counts.items():
        if extractors and count <= NEIGHBOURS:
            raise UserError(
                f"{count} {name} images: distances, precision and recall need {NEIGHBOURS + 1} or more; "
                "give more, or score by --clip or --lpips alone"
            )


def _reconstruction(request: Request, reference: ImageSet) -> tuple[str, dict[str, Any]]:
    experiment = request.experiment
    assert experiment is not None
    config = experiment.tokenizer
    if request.image_size not in (None, config.image_size):
        raise UserError(f"--image_size={request.image_size}: the config's tokenizer takes {config.image_size} px")
    if not request.checkpoint:
        raise UserError("--checkpoint is missing: give a tokenizer's workdir, a model folder or a release")
    params = load_tokenizer(request.checkpoint, config)
    places = random_subset(len(reference.infos), request.count, request.seed)
    chosen = Subset(reference, places.tolist())
    extractors = request.evaluators(config.image_size).extractors if any(request.networks) else ()
    _check_enough(extractors, chosen=len(places))
    lpips = load_lpips(request.lpips) if request.lpips else None
    run = {
        "what": request.what,
        "checkpoint": request.checkpoint,
        "model": weights_digest(params),
        "image_size": config.image_size,
        "reference": {"path": request.reference, "digest": chosen.digest},
        "networks": {one.network.name: one.network.digest for one in extractors},
        "lpips": bool(lpips),
    }
    _begin(request, run)
    results = score_reconstructions(
        config,
        params,
        chosen,
        extractors,
        lpips,
        gallery=(reference, places),
        keep=request.out / "kept",
        batch_size=request.batch_size,
    )
    if jax.process_index() == 0:
        save_reconstruction_grid(config, params, chosen, request.out / "reconstructions.png")
    return _finish(
        request, run, results, report.reconstruction_rows(f"{request.checkpoint}, {config.image_size} px", results)
    )


def _generation(request: Request, reference: ImageSet) -> tuple[str, dict[str, Any]]:
    experiment = request.experiment
    assert isinstance(experiment, HartExperiment)
    places = random_subset(len(reference.infos), request.count, request.seed)
    infos = [reference.infos[place] for place in places]
    categories = sorted({info.category for info in reference.infos} - {""})
    check_prompts(infos, categories, experiment)
    size = experiment.tokenizer.image_size if request.image_size is None else request.image_size
    evaluators = request.evaluators(size)
    _check_enough(evaluators.extractors, real=len(reference.infos), sampled=len(places))
    model = load_model(request.checkpoint)
    check_model(model, experiment, request.checkpoint)
    sample = experiment.sample.of_model(model.transformer_config, request.untrained_scales)
    experiment = dataclasses.replace(experiment, sample=sample)
    classes = _classes(model, experiment, categories) if experiment.transformer.num_classes else ()
    requests = requests_of(infos, experiment, classes, request.seed)
    text = text_source(model, experiment, request.text_encoder, request.system_prompt)
    identity = output.identity(model, sample, text)
    run = {
        "what": request.what,
        "checkpoint": request.checkpoint,
        "smooth": sample.smooth,
        "discrete_only": sample.discrete_only,
        **identity,
        "seed": request.seed,
        "count": len(places),
        "image_size": size,
        "by": request.by,
        **_of(request, reference, evaluators),
    }
    _begin(request, run)
    pipe = Pipeline(
        model,
        sample,
        *text,
        mesh=experiment.mesh,
        devices=jax.local_devices(),
        untrained_scales=request.untrained_scales,
    )
    # The pipeline has its own copy.
    del model
    samples = sample_images(
        pipe,
        experiment,
        requests,
        infos,
        request.out / "pictures",
        request.draw_batch_size,
        identity,
        request.checkpoint,
    )
    name = request.checkpoint
    name += f", scales {list_text(sample.scales)}" if isinstance(sample.scales, tuple) and sample.scales else ""
    name += ", smooth" if sample.smooth else ""
    name += ", discrete only" if sample.discrete_only else ""
    return _scored(request, run, reference, samples, places, evaluators, size, name)


def _images(request: Request, reference: ImageSet) -> tuple[str, dict[str, Any]]:
    assert request.images is not None
    image_set = open_images(request.images)
    size = request.image_size or 0
    evaluators = request.evaluators(size)
    places = _same_names(reference.infos, image_set.infos)
    if places is not None:
        image_set = Relabelled(image_set, [reference.infos[place] for place in places])
    chosen = random_subset(len(image_set.infos), request.count, request.seed)
    image_set, places = Subset(image_set, chosen.tolist()), None if places is None else places[chosen]
    _check_enough(evaluators.extractors, real=len(reference.infos), chosen=len(chosen))
    _check_prompts_for_clip(evaluators, image_set)
    run = {
        "what": request.what,
        "pictures": {"path": request.images, "digest": image_set.digest},
        "seed": request.seed,
        "image_size": size,
        "by": request.by,
        **_of(request, reference, evaluators),
    }
    _begin(request, run)
    return _scored(request, run, reference, image_set, places, evaluators, size, request.images)


def _classes(model: Model, experiment: HartExperiment, categories: Sequence[str]) -> Sequence[str]:
    """The names of the model's classes in the order of their labels: its own, or those of its training shards.

    A model that has lost them can still be asked for the classes of a reference that has just as many.

    Raises:
      UserError: the reference has others, or the names are not known.
    """
    classes = model.classes or class_names(experiment.data.train_folders)
    if not classes and len(categories) == experiment.transformer.num_classes:
        return categories
    if not classes:
        raise UserError(
            f"the names of the model's {experiment.transformer.num_classes} classes are not known, and --reference has "
            f"{len(categories)} categories; write them, in the order of their labels, into transformer/{CLASSES}"
        )
    unknown = sorted(set(map(normalized, categories)) - set(map(normalized, classes)))
    if unknown:
        raise UserError(
            f"--reference: category {', '.join(unknown[:5])} is no class of the model, whose classes are "
            f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        )
    return classes


def _same_names(real: list[ImageInfo] | Any, fake: list[ImageInfo] | Any) -> np.ndarray | None:
    """Where each image's namesake is among the real ones; None unless all have one. Folders and suffixes are no part
    of a name."""
    of_name = {normalized(Path(info.name).stem): place for place, info in enumerate(real)}
    places = [of_name.get(normalized(Path(info.name).stem), -1) for info in fake]
    return np.array(places) if len(of_name) == len(real) and min(places) >= 0 else None


def _of(request: Request, reference: ImageSet, evaluators: Evaluators) -> dict[str, Any]:
    networks = [one.network for one in evaluators.extractors] + ([evaluators.clip[0].images] if evaluators.clip else [])
    return {
        "reference": {"path": request.reference, "digest": reference.digest},
        "networks": {network.name: network.digest for network in networks},
    }


def _begin(request: Request, run: dict[str, Any]) -> None:
    first_process_first(lambda: report.begin(request.out, run))


def _scored(
    request: Request,
    run: dict[str, Any],
    real: ImageSet,
    fake: ImageSet,
    places: np.ndarray | None,
    evaluators: Evaluators,
    size: Scale,
    name: str,
) -> tuple[str, dict[str, Any]]:
    results = score_images(real, fake, places, evaluators, by=request.by, keep=request.out / "kept", seed=request.seed)
    if jax.process_index() == 0:
        save_sample_grid(real, fake, places, size, request.out / "drawn.png", request.seed)
        if request.by:
            save_group_grid(fake, request.by, size, request.out / f"by_{request.by}.png", request.seed)
    return _finish(request, run, results, report.generation_rows(name, results))


def _check_prompts_for_clip(evaluators: Evaluators, image_set: ImageSet) -> None:
    if evaluators.clip is not None and not all(info.prompt for info in image_set.infos):
        raise UserError("--clip: a CLIP score needs a prompt for every image; give captioned images, or leave it out")


def _finish(
    request: Request, run: dict[str, Any], results: dict[str, Any], rows: list[dict[str, str]]
) -> tuple[str, dict[str, Any]]:
    table = report.markdown(rows)
    if jax.process_index() == 0:
        table = report.finish(request.out, run, results, rows)
    return table, results
