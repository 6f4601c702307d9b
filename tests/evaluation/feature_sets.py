"""Made-up sets of features for the tests of scores."""

import numpy as np

from hart_jax.evaluation.images import ImageInfo
from hart_jax.evaluation.scores import FeatureSet

WIDTH = 6
STYLES = ("flat", "3d")


def feature_set(features: np.ndarray, infos=None, logits=None, textures=None) -> FeatureSet:
    infos = [ImageInfo(str(index)) for index in range(len(features))] if infos is None else infos
    return FeatureSet(infos, features.astype(np.float32), logits, textures)


def normal(count: int, seed: int = 0, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (count, WIDTH))
