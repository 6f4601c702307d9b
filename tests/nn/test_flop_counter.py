"""FLOPs as counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from hart_jax.nn.flop_counter import count_flops, peak_flops


def matrix(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def test_products_and_their_gradients():
    a, b = matrix(5, 3, 4), matrix(5, 4, 7)
    assert count_flops(jnp.matmul, a, b) == 2 * 5 * 3 * 4 * 7
    loss = lambda a, b: jnp.sum(jnp.sin(a @ b))  # noqa: E731
    assert count_flops(jax.grad(loss, argnums=(0, 1)), a, b) == 3 * 2 * 5 * 3 * 4 * 7


@pytest.mark.parametrize("strides", [1, 2])
def test_convolutions(strides):
    image, kernel = matrix(2, 8, 8, 6), matrix(3, 3, 6, 10)

    def convolve(image, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(image, kernel, (strides, strides), "SAME", dimension_numbers=layout)

    forward = 2 * 2 * (8 // strides) ** 2 * 10 * 9 * 6
    assert count_flops(convolve, image, kernel) == forward
    both = jax.grad(lambda *arrays: jnp.sum(convolve(*arrays) ** 2), argnums=(0, 1))
    assert count_flops(both, image, kernel) == 3 * forward


def test_control_flow():
    weights, x = matrix(6, 4, 4), matrix(2, 4)
    product = 2 * 2 * 4 * 4
    scanned = jax.jit(lambda x, weights: lax.scan(lambda x, w: (x @ w, None), x, weights))
    assert count_flops(scanned, x, weights) == 6 * product
    branches = lambda flag, x: lax.cond(flag, lambda x: x @ weights[0] @ weights[1], lambda x: x @ weights[0], x)  # noqa: E731
    assert count_flops(branches, True, x) == 2 * product


def test_kernels_count_once_for_every_cell_of_their_grid():
    def multiply(a, b):
        def kernel(a_ref, b_ref, out_ref):
            out_ref[...] = a_ref[...] @ b_ref[...]

        rows = pl.BlockSpec((8, 16), lambda i: (i, 0))
        whole = pl.BlockSpec((16, 16), lambda i: (0, 0))
        shape = jax.ShapeDtypeStruct(a.shape, a.dtype)
        return pl.pallas_call(kernel, shape, grid=(4,), in_specs=[rows, whole], out_specs=rows)(a, b)

    assert count_flops(multiply, matrix(32, 16), matrix(16, 16)) == 2 * 32 * 16 * 16


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_peaks_by_kind_of_device(kind, peak):
    assert peak_flops(kind) == peak


def test_all_devices_count_together():
    mesh = jax.sharding.AbstractMesh((2, 3), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, whole = jax.P("data"), jax.P()

    def multiply(a, b):
        return jax.shard_map(jnp.matmul, in_specs=(split, whole), out_specs=split, check_vma=False)(a, b)

    # The three devices along `tensor` do the same.
    with jax.sharding.use_abstract_mesh(mesh):
        assert count_flops(multiply, matrix(8, 4), matrix(4, 5)) == 2 * 8 * 4 * 5


def test_a_kernel_that_says_what_it_does_is_believed():
    def multiply(a, b):
        def kernel(a_ref, b_ref, out_ref):
            out_ref[...] = a_ref[...] @ b_ref[...]

        cost = pl.CostEstimate(flops=7, bytes_accessed=0, transcendentals=0)
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((8, 5), a.dtype), cost_estimate=cost)(a, b)

    assert count_flops(multiply, matrix(8, 4), matrix(4, 5)) == 7
