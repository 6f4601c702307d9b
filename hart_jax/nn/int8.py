"""Weights as int8 with a float32 scale for each output channel, to draw with: half the memory of bfloat16.

`quantize` replaces the matrices of a transformer (with its heads) or of a Qwen2, each by an `Int8` in the same place of
the tree; all else stays as it is. Modules, samplers, `split_layers` and the rules of `parallel.rules` take such a tree
as they take floats: `layers.matmul` and `layers.lookup` dequantize a matrix where they use it, one layer at a time.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.errors import UserError

# The axis along which the values of a matrix share a scale, by its name: what a product sums over, a table's row.
SHARED_AXIS = {"kernel": -2, "qkv": -4, "embedding": -1}
_RANKS = {"kernel": (2, 3), "qkv": (4, 5), "embedding": (2,)}  # a stack of layers has one axis more
_LARGEST = 127


@flax.struct.dataclass
class Int8:
    """The matrix `values * scales`: `values` int8 of its shape, `scales` float32 of its rank and 1 along `SHARED_AXIS`.

    Flax compares the first leaf of a parameter, here `values`, with the shape that its module declares.
    """

    values: jax.Array | np.ndarray
    scales: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def quantize(params: Any) -> Any:
    """Parameters with every matrix as `Int8`, rounded to nearest, so that no weight moves by more than scale / 2.

    Args:
      params: unboxed parameters of `Hart` or `Qwen2`, stacked or layer by layer. NumPy's stay on the host; under `jit`
        and `eval_shape` it works as well, where no value is checked.

    Raises:
      UserError: there is no matrix, or one that is int8 already, is not finite, or is of another kind of model.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_int8)
    if not any(_kind(path) in SHARED_AXIS for path, _ in leaves):
        raise UserError("int8 weights: there is no matrix among these parameters; give those of a Hart or a Qwen2")

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        kind = _kind(path)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return quantize_matrix(leaf, kind, name) if kind in SHARED_AXIS else leaf

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_int8)


def quantize_matrix(matrix: Any, kind: str, name: str) -> Int8:
    """One matrix, or a stack of them; `kind` is a key of `SHARED_AXIS`, `name` for the message. See `quantize`."""
    if _is_int8(matrix):
        raise UserError(f"int8 weights: {name} is int8 already; quantize float parameters, and once")
    if matrix.ndim not in _RANKS[kind]:
        raise UserError(f"int8 weights: {name} is {matrix.shape}, which is no matrix of a Hart or a Qwen2")
    xp, axis = matrix.__array_namespace__(), SHARED_AXIS[kind]
    largest = xp.maximum(xp.max(matrix, axis=axis, keepdims=True), -xp.min(matrix, axis=axis, keepdims=True))
    # A channel of zeros has a scale, too.
    scales = xp.maximum(largest.astype(np.float32) / _LARGEST, np.finfo(np.float32).tiny)
    if not isinstance(scales, jax.core.Tracer) and not np.isfinite(scales).all():
        raise UserError(f"int8 weights: {name} has values that are not finite")
    values = xp.clip(xp.rint(matrix / scales), -_LARGEST, _LARGEST)
    return Int8(values.astype(np.int8), scales)


def dequantize(params: Any) -> Any:
    """The float32 parameters that these stand for, e.g. to write them."""

    def one(leaf: Any) -> Any:
        return leaf.values * leaf.scales if _is_int8(leaf) else leaf

    return jax.tree.map(one, params, is_leaf=_is_int8)


def matmul(equation: str, x: jax.Array, kernel: Int8) -> jax.Array:
    """`einsum` of x and a kernel whose first axis it sums over, the others being the result's last; in the type of x.

    Int8 values are exact in bfloat16, and the sum is scaled before it is rounded.
    """
    y = jnp.einsum(equation, x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * kernel.scales[0]).astype(x.dtype)


def lookup(table: Int8, index: jax.Array) -> jax.Array:
    """Rows of a table, float32."""
    return jnp.asarray(table.values)[index] * jnp.asarray(table.scales)[index]


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _kind(path: tuple[Any, ...]) -> str:
    """The name of a parameter in its module."""
    return str(getattr(path[-1], "key", "")) if path else ""
