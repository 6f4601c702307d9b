"""Weights as int8 with float32 scales, in memory and in weight files alike: which arrays, which scales, which rounding.

An array is a matrix by the last word of its name ("word_embedding"). Values that a product adds up share a scale, so
that one is left for each output channel; so do the values of a table's row.
"""

import re
from typing import Any

import flax.struct
import jax
import numpy as np

from hart_jax.errors import UserError

_LARGEST = 127
_CONVOLUTION = (-4, -3, -2)
# By name, then rank; a stack of layers has one axis more.
_SHARED_AXES: dict[str, dict[int, tuple[int, ...]]] = {
    "kernel": {2: (-2,), 3: (-2,), 4: _CONVOLUTION, 5: _CONVOLUTION},
    "qkv": {4: (-4,), 5: (-4,)},
    "embedding": {2: (-1,)},
}


@flax.struct.dataclass
class Int8:
    """The matrix `values * scales`: `values` int8 of its shape, `scales` float32 of its rank, 1 along `shared_axes`.

    Flax compares the first leaf of a parameter, here `values`, with the shape that its module declares.
    """

    values: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def is_matrix(name: str) -> bool:
    """Whether a parameter has the name of one in its module."""
    return _kind(name) in _SHARED_AXES


def shared_axes(name: str, rank: int) -> tuple[int, ...] | None:
    """The axes along which the values of a matrix share a scale; None of an array that is none."""
    return _SHARED_AXES.get(_kind(name), {}).get(rank)


def quantize_matrix(matrix: Any, name: str, source: str) -> Int8:
    """A matrix, rounded to nearest, so that no weight moves by more than scale / 2.

    Args:
      matrix: of floats; NumPy's stays on the host; under `jit` and `eval_shape` no value is checked.
      name: the parameter's, in its module or with those above it.
      source: what it is called in messages.

    Raises:
      UserError: it is int8 already, is not finite, or is no matrix of a model.
    """
    if isinstance(matrix, Int8):
        raise UserError(f"int8 weights: {source} is int8 already; quantize float parameters, and once")
    axes = shared_axes(name, matrix.ndim)
    if axes is None:
        raise UserError(f"int8 weights: {source} is {matrix.shape}, which is no matrix of a model")
    xp = matrix.__array_namespace__()
    largest = xp.maximum(xp.max(matrix, axis=axes, keepdims=True), -xp.min(matrix, axis=axes, keepdims=True))
    # A channel of zeros has a scale, too.
    scales = xp.maximum(largest.astype(np.float32) / _LARGEST, np.finfo(np.float32).tiny)
    if not isinstance(scales, jax.core.Tracer) and not np.isfinite(scales).all():
        raise UserError(f"int8 weights: {source} has values that are not finite")
    values = xp.clip(xp.rint(matrix / scales), -_LARGEST, _LARGEST)
    return Int8(values.astype(np.int8), scales)


def _kind(name: str) -> str:
    return re.split("[/_]", name)[-1]
