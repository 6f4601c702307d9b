"""How much of the codebook images use, scale by scale.

Letters: B images of L tokens over all scales, S scales, V codes.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class FractionUsed(NamedTuple):
    """Of the codes, how many occurred at each scale.

    Attributes:
      of_codebook_S: out of all V.
      of_possible_S: out of min(V, tokens seen): 1 where no tokens could have used more codes, 0 without tokens.
    """

    of_codebook_S: np.ndarray
    of_possible_S: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Usage:
    """How often each code occurred at each scale: int64 counts."""

    counts_SV: np.ndarray

    @classmethod
    def empty(cls, scales: int, vocab_size: int) -> "Usage":
        return cls(np.zeros((scales, vocab_size), np.int64))

    def add(self, indices_BL: np.ndarray, sizes: Sequence[int]) -> "Usage":
        """With more images' tokens; a row has the scales from coarse to fine, of so many tokens each.

        Raises:
          ValueError: the tokens are not those of such scales and codebook.
        """
        indices_BL = np.asarray(indices_BL)
        scales, vocab_size = self.counts_SV.shape
        if len(sizes) != scales or indices_BL.ndim != 2 or indices_BL.shape[1] != sum(sizes):
            raise ValueError(f"tokens of shape {indices_BL.shape}, sizes={tuple(sizes)}: counts {scales} scales")
        if indices_BL.size and not 0 <= indices_BL.min() <= indices_BL.max() < vocab_size:
            raise ValueError(
                f"tokens from {indices_BL.min()} to {indices_BL.max()}: the codebook has 0 to {vocab_size - 1}"
            )
        parts = np.split(indices_BL, np.cumsum(sizes)[:-1], axis=1)
        return Usage(self.counts_SV + np.stack([np.bincount(part.ravel(), minlength=vocab_size) for part in parts]))

    def merge(self, other: "Usage") -> "Usage":
        """Of both sets of images together; raises `ValueError` for other scales or another codebook."""
        if self.counts_SV.shape != other.counts_SV.shape:
            raise ValueError(f"usage of {self.counts_SV.shape} and {other.counts_SV.shape} codes does not merge")
        return Usage(self.counts_SV + other.counts_SV)

    @property
    def fraction_used(self) -> FractionUsed:
        """Of the codes, how many occurred; see `FractionUsed`."""
        used_S, tokens_S = np.sum(self.counts_SV > 0, axis=1), self.counts_SV.sum(axis=1)
        vocab_size = self.counts_SV.shape[1]
        return FractionUsed(used_S / vocab_size, used_S / np.clip(tokens_S, 1, vocab_size))

    @property
    def perplexity_S(self) -> np.ndarray:
        """exp of the entropy of a scale's codes: so many equally frequent ones would be as varied; 0 without tokens."""
        tokens_S1 = self.counts_SV.sum(axis=1, keepdims=True)
        p_SV = self.counts_SV / np.maximum(tokens_S1, 1)
        entropy_S = -np.sum(p_SV * np.log(np.where(p_SV > 0, p_SV, 1)), axis=1)
        return np.where(tokens_S1[:, 0] > 0, np.exp(entropy_S), 0)
