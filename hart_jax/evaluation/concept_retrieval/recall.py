"""Whether drawn pictures show what was asked for, without a network that reads text: by the nearest real picture.

A drawn picture is right where the nearest of the real pictures, or one of the five nearest, has the concept (or style)
of its caption. Near is near in a space of that attribute's own (`Discriminant`), learned from real pictures: to a
classifier's features alone, the nearest picture of a dog is a dog in whichever style. Blurred copies of them are
learned from as well, so that a space does not go by what little a blur takes away. No picture is sought in a space
that was learned from its own concept: there are two spaces, each learned from half of the concepts and asked for the
others. The real pictures themselves, each without itself, are the ceiling; captions shuffled among the drawn pictures
are the floor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hart_jax.evaluation.concept_retrieval.discriminant import Discriminant
from hart_jax.evaluation.concept_retrieval.neighbours import nearest, recall_at
from hart_jax.evaluation.scores import Seen

RANKS = (1, 5)


def attributes_of(seen: Seen) -> list[str]:
    """What can be asked of all pictures: the attributes of their captions' file, or the category alone."""
    names = sorted(set.intersection(*(set(about.attributes) for about in seen.abouts)))
    if names:
        return names
    return ["category"] if all(about.category for about in seen.abouts) else []


def concept_recall(
    real: Seen,
    soft: Seen,
    fakes: Sequence[Seen],
    own_N: np.ndarray,
    attributes: Sequence[str],
    by: str = "",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Recall at 1 and 5 of each attribute: of drawn pictures, of real ones, of shuffled captions.

    Args:
      real: the pictures to be found; `soft` are their blurred copies, to learn from (`blurred_copies`).
      fakes: sets of drawn pictures, each of the same captions; there is a result for each.
      own_N: the places in `real` of the pictures whose captions those are. These are the real pictures that are asked,
        those of them that are not the only one with their value.
      attributes: names of what is asked for; see `About.value`.
      by: an attribute for whose values the recalls are given one by one, too.
      seed: of the shuffled captions, and of the halves that spaces are learned from.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(own_N))
    labels = {name: np.array([about.value(name) for about in real.abouts]) for name in attributes}
    half_G = _half(max(labels.values(), key=lambda values: len(set(values))), random)
    wanted = {name: np.array([about.value(name) for about in fakes[0].abouts]) for name in (*attributes, by)}
    results: list[dict[str, Any]] = [{} for _ in fakes]
    for name in attributes:
        label_G = labels[name]
        again, *found = (np.empty((len(own_N), max(RANKS)), np.int64) for _ in (real, *fakes))
        for learned_G in (half_G, ~half_G):
            asked_N = ~learned_G[own_N]
            if asked_N.any():
                learned_from = np.concatenate([real.look_NP[learned_G], soft.look_NP[learned_G]])
                space = Discriminant.of(learned_from, np.tile(label_G[learned_G], 2))
                gallery_GP, own = space.directions(real.look_NP), own_N[asked_N]
                again[asked_N] = nearest(gallery_GP[own], gallery_GP, max(RANKS), exclude=own)
                for drawn, fake in zip(found, fakes, strict=True):
                    drawn[asked_N] = nearest(space.directions(fake.look_NP[asked_N]), gallery_GP, max(RANKS))
        values, counts = np.unique(label_G, return_counts=True)
        shared_N = np.isin(label_G[own_N], values[counts > 1])
        for drawn, result in zip(found, results, strict=True):
            scores: dict[str, Any] = {
                "drawn": _recalls(drawn, label_G, wanted[name]),
                "shuffled": _recalls(drawn, label_G, wanted[name][order]),
            }
            if shared_N.any():
                scores["real"] = _recalls(again[shared_N], label_G, label_G[own_N][shared_N])
            if by:
                scores[f"drawn, by {by}"] = {
                    str(value): _recalls(drawn[wanted[by] == value], label_G, wanted[name][wanted[by] == value])
                    for value in np.unique(wanted[by])
                }
            result[name] = scores
    return results


def _half(label_G: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(G,) whether a picture's label is in a random half of the labels; of pictures, if all have the same label."""
    values = np.unique(label_G)
    if len(values) == 1:
        return random.permutation(len(label_G)) < len(label_G) // 2
    return np.isin(label_G, random.permutation(values)[: len(values) // 2])


def _recalls(found_QK: np.ndarray, labels_G: np.ndarray, wanted_Q: np.ndarray) -> dict[str, float]:
    return {f"recall_at_{k}": value for k, value in recall_at(found_QK, labels_G, wanted_Q, ks=RANKS).items()}
