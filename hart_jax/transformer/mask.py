"""Who sees whom: one object that training, sampling and the image of attention share (`Hart.mask`).

HART's mask is scale-causal, and costs one number per query. Any other pattern is a subclass of `Mask` with a `seen` of
its own; attention then computes all pairs and leaves out what is not seen.
"""

import abc
import dataclasses

import numpy as np

from pallas_kernels.attention.mask import Segments, segment_ends


def scale_causal_segments(context_tokens: int, scale_sizes: tuple[int, ...]) -> Segments:
    """The scale-causal mask: the context sees itself, a scale sees everything up to its own end.

    `scale_sizes` are the tokens present of scales 1, 2, ...:

        context  # . .
        scale 1  # # .
        scale 2  # # #
    """
    sizes = (context_tokens, *scale_sizes)
    return tuple(zip(sizes, np.cumsum(sizes).tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class DenseMask:
    """Which of M keys each of Q queries sees; held as bytes, so that programs that differ in it are told apart."""

    shape: tuple[int, int]
    bits: bytes

    @classmethod
    def of(cls, seen_QM: np.ndarray) -> "DenseMask":
        """Of booleans (Q, M)."""
        return cls(seen_QM.shape, np.packbits(seen_QM).tobytes())

    @property
    def seen_QM(self) -> np.ndarray:
        """Booleans (Q, M)."""
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.shape[0] * self.shape[1])
        return bits.reshape(self.shape).astype(bool)


class Mask(abc.ABC):
    """Which positions each position sees, for any scales; subclasses define `seen`."""

    @abc.abstractmethod
    def seen(self, context_tokens: int, scale_sizes: tuple[int, ...]) -> np.ndarray:
        """Booleans (Q, Q), rows queries, columns keys: the context's positions, then `scale_sizes` of scales 1, 2, ...

        The context sees itself alone, and no scale a later one: sampling does not have what comes later. The last scale
        may be there in part: training leaves tokens out, and masked iterations fill it bit by bit.
        """

    def of_all(self, context_tokens: int, scale_sizes: tuple[int, ...]) -> Segments | DenseMask:
        """As attention over all positions takes it.

        Raises:
          ValueError: `seen` gives no such pattern.
        """
        return DenseMask.of(self._checked(context_tokens, scale_sizes))

    def of_last(self, context_tokens: int, scale_sizes: tuple[int, ...], count: int) -> DenseMask | None:
        """As attention of the last `count` positions over all takes it; None where they see all.

        Raises:
          ValueError: `seen` gives no such pattern.
        """
        seen_QM = self._checked(context_tokens, scale_sizes)[-count:]
        return None if seen_QM.all() else DenseMask.of(seen_QM)

    def _checked(self, context_tokens: int, scale_sizes: tuple[int, ...]) -> np.ndarray:
        seen, name = np.asarray(self.seen(context_tokens, scale_sizes)), type(self).__name__
        ends_Q = segment_ends(scale_causal_segments(context_tokens, scale_sizes))
        if seen.shape != (len(ends_Q), len(ends_Q)) or seen.dtype != bool:
            raise ValueError(f"{name}.seen: must give booleans {(len(ends_Q),) * 2}, not {seen.dtype} {seen.shape}")
        if (seen & (np.arange(len(ends_Q)) >= ends_Q[:, None])).any():
            raise ValueError(f"{name}.seen: a position sees a later scale, which is not there yet when it is sampled")
        if not seen.any(axis=1).all():
            raise ValueError(f"{name}.seen: a position sees nothing")
        return seen


@dataclasses.dataclass(frozen=True)
class ScaleCausal(Mask):
    """HART's, see `scale_causal_segments`: what is not seen is not computed."""

    def seen(self, context_tokens: int, scale_sizes: tuple[int, ...]) -> np.ndarray:
        ends_Q = segment_ends(scale_causal_segments(context_tokens, scale_sizes))
        return np.arange(len(ends_Q)) < ends_Q[:, None]

    def of_all(self, context_tokens: int, scale_sizes: tuple[int, ...]) -> Segments:
        return scale_causal_segments(context_tokens, scale_sizes)

    def of_last(self, context_tokens: int, scale_sizes: tuple[int, ...], count: int) -> None:
        return None


SCALE_CAUSAL = ScaleCausal()
