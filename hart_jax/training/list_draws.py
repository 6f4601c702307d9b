"""Several lists of scales on one model: which one a step is trained on (`transformer.scale_lists`)."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

List = TypeVar("List")


def draw_list(seed: int, step: int, lists: Sequence[List]) -> List:
    """The list of step number `step`: every one is as likely as the others. It depends on nothing but the arguments."""
    if len(lists) == 1:
        return lists[0]
    return lists[int(np.random.default_rng((seed, step, 1)).integers(len(lists)))]
