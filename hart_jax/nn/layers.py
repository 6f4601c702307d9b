"""Layers that the transformer and the diffusion head share, with logical axis names on every parameter."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from hart_jax.io.int8_scheme import Int8
from hart_jax.nn import int8

MATMUL_OUTPUT = "product"
Axes = tuple[str | None, ...]


def matmul(equation: str, x: jax.Array, kernel: jax.Array | Int8) -> jax.Array:
    """`jnp.einsum` of x and a kernel, in the type of x; rematerialisation knows its result as `MATMUL_OUTPUT`.

    The kernel is float32 or, to sample with, int8. Its gradient is float32 from its first sum on, over samples and over
    devices, where the usual one is rounded to the type of x before devices add theirs.
    """
    y = int8.matmul(equation, x, kernel) if isinstance(kernel, Int8) else _matmul(equation, x, kernel)
    return checkpoint_name(y, MATMUL_OUTPUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _einsum_as(x, equation, x, kernel.astype(x.dtype))


def _matmul_forward(equation: str, x: jax.Array, kernel: jax.Array):
    return _matmul(equation, x, kernel), (x, kernel)


def _matmul_backward(equation: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array):
    (x, kernel), (inputs, out) = kept, equation.split("->")
    of_x, of_kernel = inputs.split(",")
    x_gradient = _einsum_as(x, f"{out},{of_kernel}->{of_x}", gradient, kernel.astype(x.dtype))
    kernel_gradient = jnp.einsum(f"{of_x},{out}->{of_kernel}", x, gradient, preferred_element_type=kernel.dtype)
    return x_gradient, kernel_gradient


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _einsum_as(x: jax.Array, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of a and b in the type of x. Of bfloat16, XLA uses a CPU's matrix unit only to sum into float32."""
    sums = jnp.float32 if platform() == "cpu" else None
    return jnp.einsum(equation, a, b, preferred_element_type=sums).astype(x.dtype)


def platform() -> str:
    """ "cpu", "gpu", "cuda" or "tpu": of the mesh that is traced under, which may be of devices that are not here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def lookup(table: jax.Array | Int8, index: jax.Array) -> jax.Array:
    """Rows of a table, which is of floats or int8."""
    return int8.lookup(table, index) if isinstance(table, Int8) else jnp.asarray(table)[index]


def lookup_rows(table_VW: jax.Array | Int8, index_BT: jax.Array, axis: str = "embed") -> jax.Array:
    """`lookup` of a batch in a table with the logical axes (vocab, `axis`), split by rows as `shard_batch` does.

    Where mesh axes split both the batch and the table's width, a device looks up its part of the width for the rows of
    all these devices, which then exchange parts. Left alone, the compiler makes the whole batch's rows whole on each.
    """
    mesh, width = jax.sharding.get_abstract_mesh(), _mesh_axes(axis)
    if table_VW.shape[1] % math.prod(mesh.shape[name] for name in width):
        width = ()
    others = tuple(name for name in _mesh_axes("batch") if name not in width)
    if len(others) < len(_mesh_axes("batch")):
        index_BT = jax.lax.with_sharding_constraint(index_BT, PartitionSpec(others or None))
        x_BTW = lookup(table_VW, index_BT)
        x_BTW = jax.lax.with_sharding_constraint(x_BTW, PartitionSpec(others or None, None, width))
    else:
        x_BTW = lookup(table_VW, index_BT)
    return shard_batch(x_BTW)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias in the type of x, added in float32, as is the bias's gradient."""
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


class Dense(nn.Module):
    """A linear layer: see `matmul` and `add_bias`. `dtype` is the compute type."""

    features: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer
    use_bias: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        rows = "abc"[: x.ndim - 1]
        y = matmul(f"{rows}i,io->{rows}o", x.astype(self.dtype or jnp.float32), kernel)
        return add_bias(y, self.param("bias", self.bias_init, (self.features,))) if self.use_bias else y


def shard_batch(x: jax.Array) -> jax.Array:
    """x with its first axis, of samples or of samples' tokens, split over the devices, and the others whole.

    Where activations of split parameters are left to the compiler, it may gather the batch instead of the weights.
    """
    return nn.with_logical_constraint(x, ("batch",) + (None,) * (x.ndim - 1))


def num_shards(*axes: str) -> int:
    """Into how many parts an array with these logical axes is split, by the mesh and rules that it is traced under."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in _mesh_axes(*axes))


def _mesh_axes(*axes: str) -> tuple[str, ...]:
    """The mesh axes that split an array with these logical axes."""
    spec = nn.logical_to_mesh_axes(axes) or ()
    return tuple(name for names in spec for name in ((names,) if isinstance(names, str) else names or ()))


def dense(
    features: int, axes: Axes, *, name: str, bias: bool = True, init=None, dtype: jnp.dtype | None = None
) -> Dense:
    """A linear layer whose kernel has these two logical axes."""
    init = nn.initializers.truncated_normal(0.02) if init is None else init
    return Dense(
        features,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        use_bias=bias,
        dtype=dtype,
        name=name,
    )


def width_init(width: int, factor: float = 1.0) -> nn.initializers.Initializer:
    """Truncated normal of deviation factor / sqrt(3 width), as VAR's: a narrow model starts with larger weights."""
    return nn.initializers.truncated_normal(factor / (3 * width) ** 0.5)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, returned in the type of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale of logical axis `axis`."""

    eps: float = 1e-6
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
        return rms_norm(x, self.param("scale", init, (x.shape[-1],)), self.eps)


def sinusoidal(t_N: jax.Array, width: int = 256, max_period: float = 10000.0) -> jax.Array:
    """(N, width) float32: cosines, then sines, of t times frequencies 1 .. 1/max_period."""
    half = width // 2
    frequencies = jnp.asarray(np.exp(-np.log(max_period) * np.arange(half, dtype=np.float32) / half))
    angles = t_N.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbed(nn.Module):
    """sinusoidal(256) -> Linear, SiLU, Linear to (N, features). `many` rows are split over the devices."""

    features: int
    axis: str
    dtype: jnp.dtype | None = None
    many: bool = False

    @nn.compact
    def __call__(self, t_N: jax.Array) -> jax.Array:
        place = shard_batch if self.many and len(t_N) > 1 else lambda x: x
        h = place(dense(self.features, (None, self.axis), name="linear_1", dtype=self.dtype)(place(sinusoidal(t_N))))
        return place(dense(self.features, (None, self.axis), name="linear_2", dtype=self.dtype)(nn.silu(h)))
