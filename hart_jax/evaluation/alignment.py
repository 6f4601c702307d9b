"""Whether drawn pictures show what was asked for, without a network that reads text: by the nearest real picture.

A drawn picture is right where the nearest of the real pictures, or one of the five nearest, has the concept (or style)
of its caption. The real pictures themselves, each without itself, are the ceiling; captions shuffled among the drawn
pictures are the floor.
"""

from collections.abc import Sequence
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

    Args:
      real: the pictures to be found.
      fake: drawn pictures; `own_N` are the places in `real` of the pictures whose captions they were drawn from.
      attributes: names of what is asked for; see `About.value`.
      by: an attribute for whose values the recalls are given one by one, too.
    """
    space = Standardized.of(real.features_NF)
    found = nearest(fake.features_NF, real.features_NF, space, count=max(RANKS))
    found_real = nearest(real.features_NF[own_N], real.features_NF, space, count=max(RANKS), exclude=own_N)
    order = np.random.default_rng(seed).permutation(len(own_N))
    result: dict[str, Any] = {}
    for name in attributes:
        labels = np.array([about.value(name) for about in real.abouts])
        wanted = np.array([about.value(name) for about in fake.abouts])
        result[name] = {
            "drawn": _recalls(found, labels, wanted),
            "real": _recalls(found_real, labels, wanted),
            "shuffled": _recalls(found, labels, wanted[order]),
        }
        if by:
            groups = np.array([about.value(by) for about in fake.abouts])
            result[name][f"drawn, by {by}"] = {
                str(group): _recalls(found[groups == group], labels, wanted[groups == group])
                for group in np.unique(groups)
            }
    return result


def _recalls(found_QK: np.ndarray, labels_G: np.ndarray, wanted_Q: np.ndarray) -> dict[str, float]:
    return {f"recall_at_{k}": value for k, value in recall_at(found_QK, labels_G, wanted_Q, ks=RANKS).items()}
