"""Whether drawn pictures show what was asked for, without a network that reads text: by the nearest real picture.

A drawn picture is right where the nearest of the real pictures, or one of the five nearest, has the concept (or style)
of its caption. Near is near in a space of that attribute's own (`Discriminant`), learned from real pictures: to a
classifier's features alone, the nearest picture of a dog is a dog in whichever style. No picture is sought in a space
that was learned from its own concept: there are two spaces, each learned from half of the concepts and asked for the
others. The real pictures themselves, each without itself, are the ceiling; captions shuffled among the drawn pictures
are the floor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hart_jax.evaluation.metrics.discriminant import Discriminant
from hart_jax.evaluation.metrics.retrieval import nearest, recall_at
from hart_jax.evaluation.scores import Seen

RANKS = (1, 5)


def attributes_of(seen: Seen) -> list[str]:
    """What can be asked of all pictures: the attributes of their captions' file, or the category alone."""
    names = sorted(set.intersection(*(set(about.attributes) for about in seen.abouts)))
    if names:
        return names
    return ["category"] if all(about.category for about in seen.abouts) else []


def alignment(
    real: Seen, fake: Seen, own_N: np.ndarray, attributes: Sequence[str], by: str = "", seed: int = 0
) -> dict[str, Any]:
    """Recall at 1 and 5 of each attribute: of the drawn pictures, of real ones, of shuffled captions.

    Args:
      real: the pictures to be found.
      fake: drawn pictures; `own_N` are the places in `real` of the pictures whose captions they were drawn from. These
        are the real pictures that are asked, those of them that are not the only one with their value.
      attributes: names of what is asked for; see `About.value`.
      by: an attribute for whose values the recalls are given one by one, too.
      seed: of the shuffled captions, and of the halves that spaces are learned from.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(own_N))
    labels = {name: np.array([about.value(name) for about in real.abouts]) for name in attributes}
    half_G = _half(max(labels.values(), key=lambda values: len(set(values))), random)
    wanted = {name: np.array([about.value(name) for about in fake.abouts]) for name in (*attributes, by)}
    result = {}
    for name in attributes:
        label_G = labels[name]
        drawn, again = (np.empty((len(own_N), max(RANKS)), np.int64) for _ in range(2))
        for learned_G in (half_G, ~half_G):
            asked_N = ~learned_G[own_N]
            if asked_N.any():
                own, look_GP = own_N[asked_N], real.look_NP
                space = Discriminant.of(look_GP[learned_G], label_G[learned_G])
                drawn[asked_N] = nearest(fake.look_NP[asked_N], look_GP, space, max(RANKS))
                again[asked_N] = nearest(look_GP[own], look_GP, space, max(RANKS), exclude=own)
        values, counts = np.unique(label_G, return_counts=True)
        shared_N = np.isin(label_G[own_N], values[counts > 1])
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
    return result


def _half(label_G: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(G,) whether a picture's label is in a random half of the labels; of pictures, if all have the same label."""
    values = np.unique(label_G)
    if len(values) == 1:
        return random.permutation(len(label_G)) < len(label_G) // 2
    return np.isin(label_G, random.permutation(values)[: len(values) // 2])


def _recalls(found_QK: np.ndarray, labels_G: np.ndarray, wanted_Q: np.ndarray) -> dict[str, float]:
    return {f"recall_at_{k}": value for k, value in recall_at(found_QK, labels_G, wanted_Q, ks=RANKS).items()}
