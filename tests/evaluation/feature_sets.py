"""Made-up sets of features for the tests of scores."""

import numpy as np

from hart_jax.evaluation.pictures import About
from hart_jax.evaluation.scores import Seen

WIDTH = 6
STYLES = ("flat", "3d")


def seen(features: np.ndarray, abouts=None, logits=None, textures=None) -> Seen:
    abouts = [About(str(index)) for index in range(len(features))] if abouts is None else abouts
    return Seen(abouts, features.astype(np.float32), logits, textures)


def normal(count: int, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, WIDTH))
