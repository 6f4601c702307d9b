"""How far samples are from real images, from a network's features of both: distances, precision, recall.

A Frechet distance is called FID only on the features of the standard InceptionV3; on others it is named after them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hart_jax.errors import UserError
from hart_jax.evaluation.feature_cache import FeatureRows
from hart_jax.evaluation.images import ImageInfo
from hart_jax.evaluation.metrics.frechet import frechet_distance
from hart_jax.evaluation.metrics.gather import gather_rows
from hart_jax.evaluation.metrics.inception_score import inception_score
from hart_jax.evaluation.metrics.kid import kid
from hart_jax.evaluation.metrics.precision_recall import precision_recall
from hart_jax.evaluation.networks.base import FeatureNetwork

# With fewer images a Frechet distance is far above that of many; the field asks for so many.
STABLE = 10_000
# Groups are compared by their distances from so many images on.
LEAST = 10
# Changes with what `feature_columns` gives, so that what an older version kept is not taken for it.
COLUMNS = 2
SUBSETS, SUBSET_SIZE, NEIGHBOURS, SPLITS = 100, 1000, 3, 10


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """A set of images as a network sees it, whole in every process, in the set's order."""

    infos: Sequence[ImageInfo]
    features_NF: np.ndarray
    logits_NK: np.ndarray | None
    textures_NT: np.ndarray | None

    @classmethod
    def of(cls, rows: FeatureRows, infos: Sequence[ImageInfo]) -> "FeatureSet":
        """Joins what the processes computed; raises `UserError` for features that are not finite."""
        gathered = {name: gather_rows(column, rows.places_N) for name, column in rows.columns.items()}
        features_NF = gathered["features"]
        bad = int(np.sum(~np.isfinite(features_NF).all(axis=1)))
        if bad:
            raise UserError(f"features of {bad} of {len(features_NF)} images are not finite")
        return cls(infos, features_NF, gathered.get("logits"), gathered.get("textures"))

    @property
    def style_features_NP(self) -> np.ndarray:
        """Textures, or where the network has none, features."""
        return self.features_NF if self.textures_NT is None else self.textures_NT


def feature_columns(network: FeatureNetwork, params: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
    """A network's features, and its logits and textures if it has any, as `feature_cache` keeps them."""
    features, logits, textures = network.apply(params, images_BHWC)
    columns = {"features": features, "logits": logits, "textures": textures}
    return {name: column for name, column in columns.items() if column is not None}


def distance_name(network: FeatureNetwork) -> str:
    return "FID" if network.standard else f"Frechet distance, {network.name}"


def compare(real: FeatureSet, fake: FeatureSet, seed: int = 0) -> dict[str, Any]:
    """Distances of the two sets, precision, recall, and the inception score of `fake` if the network has classes.

    `kid` is the mean over random subsets, of `kid_subset` images each, times 1000 like its deviation.
    """
    mean, deviation = kid(real.features_NF, fake.features_NF, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed)
    precision, recall = precision_recall(real.features_NF, fake.features_NF, k=NEIGHBOURS)
    scores = {
        "frechet_distance": frechet_distance(real.features_NF, fake.features_NF),
        "kid_x1000": 1000 * mean,
        "kid_x1000_deviation": 1000 * deviation,
        "kid_subset": min(SUBSET_SIZE, len(real.features_NF), len(fake.features_NF)),
        "precision": precision,
        "recall": recall,
    }
    if fake.logits_NK is not None:
        scores["inception_score"], scores["inception_score_deviation"] = inception_score(
            fake.logits_NK, splits=min(SPLITS, len(fake.logits_NK))
        )
    return scores


def real_vs_real(real: FeatureSet, count: int, seed: int = 0) -> dict[str, Any]:
    """Real against real: `count` of the images drawn at random, at most half, against the others.

    What perfect images would score, as far as so few can tell.
    """
    order = np.random.default_rng(seed).permutation(len(real.features_NF))
    part = min(count, len(order) // 2)
    one, other = real.features_NF[np.sort(order[:part])], real.features_NF[np.sort(order[part:])]
    mean, _ = kid(other, one, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=seed)
    return {
        "pictures": part,
        "frechet_distance": frechet_distance(other, one),
        "kid_x1000": 1000 * mean,
    }


def by_group(real: FeatureSet, fake: FeatureSet, attribute: str) -> dict[str, dict[str, Any]]:
    """Frechet distance and number of samples for each value of an attribute, of groups that are large enough."""
    groups: dict[str, dict[str, Any]] = {}
    real_values, fake_values = ([info.value(attribute) for info in each.infos] for each in (real, fake))
    for value in sorted(set(fake_values) - {""}):
        ours, theirs = (
            features[[index for index, other in enumerate(values) if other == value]]
            for features, values in ((fake.features_NF, fake_values), (real.features_NF, real_values))
        )
        if min(len(ours), len(theirs)) >= LEAST:
            distance = frechet_distance(theirs, ours)
            groups[value] = {"pictures": len(ours), "frechet_distance": distance}
    return groups


def warnings_of(counts: Mapping[str, int]) -> list[str]:
    """What to be careful with, of numbers of images by what they are."""
    return [
        f"only {count} {what} images: a Frechet distance needs about {STABLE} to be stable, is larger with fewer, "
        "and compares only with those of as many"
        for what, count in counts.items()
        if count < STABLE
    ]
