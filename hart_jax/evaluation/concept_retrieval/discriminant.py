"""A space in which images of one label lie close: Fisher's linear discriminant, learned from real images.

What differs among images of the same label is scaled down (their scatter becomes the identity), what differs between
the labels' means is scaled up (by their scatter). Letters: N images, F features, L labels.
"""

import dataclasses

import numpy as np

from hart_jax.evaluation.concept_retrieval.neighbours import Standardized, unit

# Added to the scatter within labels, in variances of a feature: few images leave it singular. Picked on real ones.
SHRINKAGE = 0.1
# Added to the scatter between labels, so that one label, which has none, still gives a space.
_LEAST = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Discriminant:
    """Features, standardised, times `matrix_FF`."""

    scale: Standardized
    matrix_FF: np.ndarray

    @classmethod
    def of(cls, features_NF: np.ndarray, labels_N: np.ndarray) -> "Discriminant":
        """Learned from these images, all in float64."""
        scale = Standardized.of(features_NF)
        scaled_NF = scale.scaled(features_NF)
        _, of_label_N, counts_L = np.unique(labels_N, return_inverse=True, return_counts=True)
        means_LF = np.zeros((len(counts_L), scaled_NF.shape[1]))
        np.add.at(means_LF, of_label_N, scaled_NF)
        means_LF /= counts_L[:, None]
        identity_FF = np.eye(scaled_NF.shape[1])
        apart_NF = scaled_NF - means_LF[of_label_N]
        within_FF = np.linalg.cholesky(apart_NF.T @ apart_NF / len(scaled_NF) + SHRINKAGE * identity_FF)
        # Means weigh as many images as they are of; that of all images is 0.
        weighted_LF = means_LF * np.sqrt(counts_L / len(scaled_NF))[:, None]
        whitened_FL = np.linalg.solve(within_FF, weighted_LF.T)
        between_FF = np.linalg.cholesky(whitened_FL @ whitened_FL.T + _LEAST * identity_FF)
        return cls(scale, np.linalg.solve(within_FF.T, between_FF))

    def directions(self, features_BF: np.ndarray) -> np.ndarray:
        """(B, F) features in this space, of length 1, or 0 where an image is the mean."""
        return unit(self.scale.scaled(features_BF) @ self.matrix_FF)
