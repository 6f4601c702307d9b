"""Int8 weights to sample with, in half the memory of bfloat16.

`quantize` replaces the matrices of a transformer (with its heads) or of a Qwen2, each by an `Int8` in the same place of
the tree; all else stays as it is. Modules, samplers, `split_layers` and the rules of `parallel.rules` take such a tree
as they take floats: `layers.matmul` and `layers.lookup` dequantize a matrix where they use it, one layer at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hart_jax.errors import UserError
from hart_jax.io.int8_scheme import Int8, is_matrix, quantize_matrix


def quantize(params: Any) -> Any:
    """Parameters with every matrix as `Int8`.

    Args:
      params: unboxed parameters of `Hart` or `Qwen2`, stacked or layer by layer.

    Raises:
      UserError: there is no matrix, or one of another kind of model, or as `quantize_matrix`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_int8)
    if not any(is_matrix(_name(path)) for path, _ in leaves):
        raise UserError("int8 weights: there is no matrix among these parameters; give those of a Hart or a Qwen2")

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_matrix(_name(path)):
            return leaf
        source = jax.tree_util.keystr(path, simple=True, separator="/")
        if _name(path) != "qkv" and len(leaf.shape) > 3:
            # A convolution, whose module takes floats.
            raise UserError(f"int8 weights: {source} is {leaf.shape}, which is no matrix of a Hart or a Qwen2")
        return quantize_matrix(leaf, _name(path), source)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_int8)


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


def _name(path: tuple[Any, ...]) -> str:
    """Of a parameter, in its module."""
    return str(getattr(path[-1], "key", "")) if path else ""
