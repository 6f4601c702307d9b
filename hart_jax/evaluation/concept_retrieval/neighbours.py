"""Do images show what their prompts say? Asked of real images: is an image's nearest one of the right kind?

It needs no network that knows text, only features and labels of real images. Letters: Q queries, G images of the
gallery, F features, K neighbours.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from hart_jax.errors import UserError

# Similarities equal in so many decimals are ties: their last digits depend on where in an array an image is.
DECIMALS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Standardized:
    """The space of a gallery: features less its mean, divided by its standard deviation, both float64.

    Queries are taken there by the gallery's numbers, never by their own.
    """

    mean_F: np.ndarray
    deviation_F: np.ndarray

    @classmethod
    def of(cls, gallery_GF: np.ndarray) -> "Standardized":
        """Of these images (divisor G); a feature that is the same in all has 1 for its deviation."""
        gallery_GF = np.asarray(gallery_GF, np.float64)
        varies_F = np.ptp(gallery_GF, axis=0) > 0
        return cls(gallery_GF.mean(axis=0), np.where(varies_F, gallery_GF.std(axis=0), 1))

    def directions(self, features_BF: np.ndarray) -> np.ndarray:
        """(B, F) scaled features, of length 1, or 0 where an image is the gallery's mean."""
        return unit(self.scaled(features_BF))

    def scaled(self, features_BF: np.ndarray) -> np.ndarray:
        """(B, F) features of mean 0 and deviation 1 in the gallery."""
        return (np.asarray(features_BF, np.float64) - self.mean_F) / self.deviation_F


def unit(vectors_BF: np.ndarray) -> np.ndarray:
    """The vectors divided by their lengths; 0 stays 0."""
    return vectors_BF / np.maximum(np.linalg.norm(vectors_BF, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def nearest(
    queries_QD: np.ndarray,
    gallery_GD: np.ndarray,
    count: int = 5,
    *,
    exclude: np.ndarray | None = None,
    block: int = 1024,
) -> np.ndarray:
    """(Q, count) indices into the gallery, the nearest first: those of the highest cosine similarity.

    Of equal ones the lowest index comes first. `block` by G similarities are held at a time.

    Args:
      queries_QD: directions in a space, `Discriminant.of(...).directions(features)` say; the gallery's in the same.
      exclude: (Q,) the gallery's image that a query must not find, because it is the query itself, or -1.

    Raises:
      UserError: the gallery has fewer than `count` images to find.
    """
    excluding = exclude is not None and bool(np.any(np.asarray(exclude) >= 0))
    available = len(gallery_GD) - excluding
    if not 1 <= count <= available:
        raise UserError(f"count={count} nearest images of a gallery of {available}: must be 1 to {available}")
    found = np.zeros((len(queries_QD), count), np.int64)
    for start in range(0, len(queries_QD), block):
        rows = slice(start, start + block)
        similarities = np.round(queries_QD[rows] @ gallery_GD.T, DECIMALS)
        if exclude is not None:
            excluded = np.asarray(exclude)[rows]
            similarities[excluded >= 0, excluded[excluded >= 0]] = -np.inf
        found[rows] = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    return found


def recall_at(
    neighbours_QK: np.ndarray, gallery_labels_G: np.ndarray, wanted_Q: np.ndarray, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """{k: share of the queries with an image of the wanted label among their first k neighbours}.

    Raises:
      ValueError: a k that is not from 1 to K, or no queries.
    """
    if not len(neighbours_QK) or not all(1 <= k <= neighbours_QK.shape[1] for k in ks):
        raise ValueError(
            f"recall at {tuple(ks)} of neighbours of shape {neighbours_QK.shape}: needs queries, k up to K"
        )
    right_QK = np.asarray(gallery_labels_G)[neighbours_QK] == np.asarray(wanted_Q)[:, None]
    return {k: float(right_QK[:, :k].any(axis=1).mean()) for k in ks}
