"""Whether samples show what was asked for, without a network that reads text: by the nearest real image.

A sample is right where the nearest of the real images, or one of the five nearest, has the concept (or style)
of its caption. Near is near in a space of that attribute's own (`Discriminant`), learned from real images: to a
classifier's features alone, the nearest image of a dog is a dog in whichever style. Blurred copies of them are
learned from as well, so that a space does not go by what little a blur takes away. No image is sought in a space
that was learned from its own concept: there are two spaces, each learned from half of the concepts and asked for the
others. The real images themselves, each without itself, are the ceiling; captions shuffled among the samples
are the lower bound.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hart_jax.evaluation.concept_retrieval.discriminant import Discriminant
from hart_jax.evaluation.concept_retrieval.neighbours import nearest, recall_at
from hart_jax.evaluation.scores import FeatureSet

RANKS = (1, 5)


def attributes_of(feature_set: FeatureSet) -> list[str]:
    """What can be asked of all images: the attributes of their captions' file, or the category alone."""
    names = sorted(set.intersection(*(set(info.attributes) for info in feature_set.infos)))
    if names:
        return names
    return ["category"] if all(info.category for info in feature_set.infos) else []


def concept_recall(
    real: FeatureSet,
    blurred: FeatureSet,
    fakes: Sequence[FeatureSet],
    own_N: np.ndarray,
    attributes: Sequence[str],
    by: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Recall at 1 and 5 of each attribute: of samples, of real images, of shuffled captions.

    Args:
      real: the images to be found; `blurred` are their copies, to learn from (`blurred_copies`).
      fakes: sets of samples, each of the same captions; there is a result for each.
      own_N: the places in `real` of the images whose captions those are. These are the real images that are asked,
        those of them that are not the only one with their value.
      attributes: names of what is asked for; see `ImageInfo.value`.
      by: an attribute for whose values the recalls are given one by one, too.
      seed: of the shuffled captions, and of the halves that spaces are learned from.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(own_N))
    labels = {name: np.array([info.value(name) for info in real.infos]) for name in attributes}
    half_G = _half(max(labels.values(), key=lambda values: len(set(values))), random)
    wanted = {name: np.array([info.value(name) for info in fakes[0].infos]) for name in (*attributes, by)}
    results: list[dict[str, Any]] = [{} for _ in fakes]
    for name in attributes:
        label_G = labels[name]
        again, *found = (np.empty((len(own_N), max(RANKS)), np.int64) for _ in (real, *fakes))
        for learned_G in (half_G, ~half_G):
            asked_N = ~learned_G[own_N]
            if asked_N.any():
                learned_from = np.concatenate([real.style_features_NP[learned_G], blurred.style_features_NP[learned_G]])
                space = Discriminant.of(learned_from, np.tile(label_G[learned_G], 2))
                gallery_GP, own = space.directions(real.style_features_NP), own_N[asked_N]
                again[asked_N] = nearest(gallery_GP[own], gallery_GP, max(RANKS), exclude=own)
                for nearest_NK, fake in zip(found, fakes, strict=True):
                    nearest_NK[asked_N] = nearest(
                        space.directions(fake.style_features_NP[asked_N]), gallery_GP, max(RANKS)
                    )
        values, counts = np.unique(label_G, return_counts=True)
        shared_N = np.isin(label_G[own_N], values[counts > 1])
        for nearest_NK, result in zip(found, results, strict=True):
            scores: dict[str, Any] = {
                "drawn": _recalls(nearest_NK, label_G, wanted[name]),
                "shuffled": _recalls(nearest_NK, label_G, wanted[name][order]),
            }
            if shared_N.any():
                scores["real"] = _recalls(again[shared_N], label_G, label_G[own_N][shared_N])
            if by:
                scores[f"drawn, by {by}"] = {
                    str(value): _recalls(nearest_NK[wanted[by] == value], label_G, wanted[name][wanted[by] == value])
                    for value in np.unique(wanted[by])
                }
            result[name] = scores
    return results


def _half(label_G: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(G,) whether an image's label is in a random half of the labels; of images, if all have the same label."""
    values = np.unique(label_G)
    if len(values) == 1:
        return random.permutation(len(label_G)) < len(label_G) // 2
    return np.isin(label_G, random.permutation(values)[: len(values) // 2])


def _recalls(found_QK: np.ndarray, labels_G: np.ndarray, wanted_Q: np.ndarray) -> dict[str, float]:
    return {f"recall_at_{k}": value for k, value in recall_at(found_QK, labels_G, wanted_Q, ks=RANKS).items()}
