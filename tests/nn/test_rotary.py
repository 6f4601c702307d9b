"""Rotary positions of context and image tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from hart_jax.nn.flop_counter import flops_of
from hart_jax.nn.rotary import (
    apply_rotary,
    context_angles,
    image_angles,
    rotary_cos_sin,
    rotate_half,
    rotate_half_by_matmul,
)
from tests.tiny import mesh_of

K = 8


def vectors(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_position_zero_rotates_nothing():
    x = vectors(0, 1, 1, 2, K)
    np.testing.assert_array_equal(apply_rotary(x, rotary_cos_sin(context_angles(jnp.zeros((1, 1), jnp.int32), K))), x)


def test_context_products_depend_on_the_distance_alone():
    q, k = vectors(0, 1, 1, 1, K), vectors(1, 1, 1, 1, K)

    def product(a: int, b: int) -> float:
        at = [context_angles(jnp.array([[position]]), K) for position in (a, b)]
        return float(jnp.sum(apply_rotary(q, rotary_cos_sin(at[0])) * apply_rotary(k, rotary_cos_sin(at[1]))))

    assert product(7, 4) == pytest.approx(product(103, 100), abs=1e-4)
    assert product(7, 4) != pytest.approx(product(7, 5), abs=1e-2)


@pytest.mark.parametrize(
    ("shape", "last_shape"),
    [((3, 2), (7, 5)), ((2, 7), (5, 20)), ((10, 3), (10, 3)), ((1, 1), (12, 4)), ((3, 3), (8, 8))],
    ids=str,
)
def test_image_rotation_is_the_formula_of_the_release(shape, last_shape):
    """The first half rotates with rows, the second with columns, and the halves against each other."""
    offset, places = 11, [(row, col) for row in range(shape[0]) for col in range(shape[1])]
    x = vectors(0, 1, len(places), 1, K)
    angle = image_angles(jnp.arange(len(places))[None], shape, last_shape, jnp.array([[offset]]), K)
    rotated = apply_rotary(x, rotary_cos_sin(angle))
    frequencies = 10000.0 ** (-np.array([0, 4]) / K)
    for index, place in enumerate(places):
        row, col = (
            np.tile((n / side * last + offset) * frequencies, 2)
            for n, side, last in zip(place, shape, last_shape, strict=True)
        )
        first, second = x[0, index, 0, : K // 2], x[0, index, 0, K // 2 :]
        parts = first * np.cos(row) - second * np.sin(row), second * np.cos(col) + first * np.sin(col)
        np.testing.assert_allclose(rotated[0, index, 0], np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_scales_share_one_square():
    """Every scale's first token lies at the offset, and a scale of half the side has every second position."""
    offset = jnp.array([[5]])
    fine = image_angles(jnp.arange(16)[None], (4, 4), (4, 4), offset, K)
    coarse = image_angles(jnp.arange(4)[None], (2, 2), (4, 4), offset, K)
    np.testing.assert_allclose(fine[0].reshape(4, 4, K)[::2, ::2].reshape(4, K), coarse[0], rtol=1e-6)
    np.testing.assert_allclose(coarse[0, 0, :2], 5 * 10000.0 ** (-np.array([0, 4]) / K), rtol=1e-6)


def test_keeps_the_type():
    angle = context_angles(jnp.array([[3]]), K)
    assert apply_rotary(jnp.ones((1, 1, 1, K), jnp.bfloat16), rotary_cos_sin(angle)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_tpu_halves_are_swapped_by_a_product(dtype):
    """The same to the last bit, in gradients too, and no work of the model."""
    x, out_gradient = jnp.asarray(vectors(0, 2, 3, 2, K), dtype), vectors(1, 2, 3, 2, K)
    (halves, pull), (product, pull_product) = (jax.vjp(swap, x) for swap in (rotate_half, rotate_half_by_matmul))
    np.testing.assert_array_equal(product, halves)
    np.testing.assert_array_equal(pull_product(out_gradient)[0], pull(out_gradient)[0])
    angles = rotary_cos_sin(context_angles(jnp.zeros((2, 3), jnp.int32), K))
    with use_abstract_mesh(mesh_of("tpu")):
        traced = jax.make_jaxpr(apply_rotary)(x, angles)
    assert "dot_general" in str(traced) and flops_of(traced.jaxpr) == 0
    assert "dot_general" not in str(jax.make_jaxpr(apply_rotary)(x, angles))
