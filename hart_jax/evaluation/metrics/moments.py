"""Mean and covariance of features that come in batches, in any order, on any number of hosts.

Letters: B pictures of a batch, F features.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from hart_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Of all features added so far, in float64.

    Adding and merging is Chan, Golub and LeVeque's pairwise update (1979), which does not cancel where means are large
    against deviations; other orders and batch sizes give the same to rounding. An update reads and writes F^2 numbers
    whatever the batch, so few large batches are quicker than many small ones.

    Attributes:
      count: pictures.
      mean_F: their mean.
      scatter_FF: sum over pictures of the outer products of their differences from the mean.
    """

    count: int
    mean_F: np.ndarray
    scatter_FF: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Moments":
        """Of no pictures; `width` is F."""
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Moments":
        """From what `to_arrays` gave, an open npz file say."""
        return cls(int(arrays["count"]), np.asarray(arrays["mean"]), np.asarray(arrays["scatter"]))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything, as arrays for `np.savez`."""
        return {"count": np.array(self.count, np.int64), "mean": self.mean_F, "scatter": self.scatter_FF}

    @property
    def width(self) -> int:
        """F."""
        return len(self.mean_F)

    @property
    def covariance(self) -> np.ndarray:
        """(F, F), unbiased, as `np.cov`; raises `UserError` for fewer than two pictures."""
        if self.count < 2:
            raise UserError(f"covariance of count={self.count} pictures: needs 2 or more")
        return self.scatter_FF / (self.count - 1)

    def add(self, features_BF: np.ndarray) -> "Moments":
        """With a batch more, of any size.

        Raises:
          UserError: features that are not finite.
          ValueError: features of another width.
        """
        batch_BF = np.asarray(features_BF, np.float64)
        if batch_BF.ndim != 2 or batch_BF.shape[1] != self.width:
            raise ValueError(f"features of shape {batch_BF.shape}: need (B, {self.width})")
        bad = int(np.sum(~np.isfinite(batch_BF).all(axis=1)))
        if bad:
            raise UserError(f"features of {bad} of {len(batch_BF)} pictures of a batch are not finite")
        if not len(batch_BF):
            return self
        mean_F = batch_BF.mean(axis=0)
        centred_BF = batch_BF - mean_F
        return self.merge(Moments(len(batch_BF), mean_F, centred_BF.T @ centred_BF))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of pictures together; raises `ValueError` for another width."""
        if other.width != self.width:
            raise ValueError(f"moments of {self.width} and of {other.width} features do not merge")
        if not other.count:
            return self
        if not self.count:
            return other
        count = self.count + other.count
        step_F = other.mean_F - self.mean_F
        between_FF = np.outer(step_F, step_F) * (self.count * other.count / count)
        mean_F = self.mean_F + step_F * (other.count / count)
        return Moments(count, mean_F, self.scatter_FF + other.scatter_FF + between_FF)
