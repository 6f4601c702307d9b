"""Whether drawn pictures show what was asked for, without a network that reads text: by the nearest real picture.

A drawn picture is right where the nearest of the real pictures, or one of the five nearest, has the concept (or style)
of its caption. The real pictures themselves, each without itself, are the ceiling; captions shuffled among the drawn
pictures are the floor. Of two attributes each is also asked among the pictures that differ in the other: the nearest
picture of a dog is a dog in whichever style, so that whether the style is right shows among pictures of other things.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hart_jax.evaluation.metrics.retrieval import Standardized, nearest, recall_at
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

    An attribute asked among pictures that differ in another is called "style, other concept", say.

    Args:
      real: the pictures to be found.
      fake: drawn pictures; `own_N` are the places in `real` of the pictures whose captions they were drawn from.
      attributes: names of what is asked for; see `About.value`.
      by: an attribute for whose values the recalls are given one by one, too.
    """
    space, gallery, own_features = Standardized.of(real.features_NF), real.features_NF, real.features_NF[own_N]
    order = np.random.default_rng(seed).permutation(len(own_N))
    labels = {name: np.array([about.value(name) for about in real.abouts]) for name in (*attributes, by)}
    wanted = {name: np.array([about.value(name) for about in fake.abouts]) for name in (*attributes, by)}
    drawn = nearest(fake.features_NF, gallery, space, max(RANKS))
    ceiling = nearest(own_features, gallery, space, max(RANKS), exclude=own_N)
    result = {name: _scores(name, (drawn, ceiling), labels, wanted, by, order) for name in attributes}
    for name, other in itertools.permutations(attributes, 2) if len(attributes) == 2 else ():
        apart = wanted[other], labels[other]
        found = [
            nearest(features, gallery, space, max(RANKS), apart=apart) for features in (fake.features_NF, own_features)
        ]
        result[f"{name}, other {other}"] = _scores(name, (found[0], found[1]), labels, wanted, by, order)
    return result


def _scores(
    name: str,
    found: tuple[np.ndarray, np.ndarray],
    labels: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    by: str,
    order: np.ndarray,
) -> dict[str, Any]:
    drawn, ceiling = found
    scores: dict[str, Any] = {
        "drawn": _recalls(drawn, labels[name], wanted[name]),
        "real": _recalls(ceiling, labels[name], wanted[name]),
        "shuffled": _recalls(drawn, labels[name], wanted[name][order]),
    }
    if by:
        scores[f"drawn, by {by}"] = {
            str(value): _recalls(drawn[wanted[by] == value], labels[name], wanted[name][wanted[by] == value])
            for value in np.unique(wanted[by])
        }
    return scores


def _recalls(found_QK: np.ndarray, labels_G: np.ndarray, wanted_Q: np.ndarray) -> dict[str, float]:
    return {f"recall_at_{k}": value for k, value in recall_at(found_QK, labels_G, wanted_Q, ks=RANKS).items()}
