"""HART's mask, and attention as every device of a mesh computes it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from hart_jax.errors import UserError
from hart_jax.nn.flop_counter import flops_of
from hart_jax.parallel.rules import AXES, RULES
from hart_jax.transformer.attention import attention
from hart_jax.transformer.mask import scale_causal_segments


def test_segments_are_scale_causal():
    assert scale_causal_segments(5, (4, 9)) == ((5, 5), (4, 9), (9, 18))


def shapes(equation) -> list[tuple[int, ...]]:
    """Of q, k and v on one device."""
    shapes = [variable.aval.shape for variable in equation.params["jaxpr"].invars]
    return [shape for shape in shapes if len(shape) == 4]


def test_each_device_has_its_own_samples_and_heads():
    q = jnp.zeros((8, 17, 4, 16))

    def run(q):
        return attention(q, q, q, kv_end=scale_causal_segments(3, (1, 4, 9)), scale=0.3)

    alone = jax.make_jaxpr(run)(q)
    mesh = AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        split = jax.make_jaxpr(run)(q)
        whole = jax.make_jaxpr(run)(q[:1])
    (equation,) = (equation for equation in split.eqns if equation.primitive.name == "shard_map")
    assert shapes(equation) == [(2, 17, 2, 16)] * 3
    # All devices together do what one would.
    assert flops_of(split.jaxpr) == flops_of(alone.jaxpr)
    # A batch that the mesh does not divide is whole everywhere, its heads still split.
    (equation,) = (equation for equation in whole.eqns if equation.primitive.name == "shard_map")
    assert shapes(equation) == [(1, 17, 2, 16)] * 3


def test_unmasked_with_more_keys_than_queries():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, length, 3, 4)).astype(np.float32) for length in (2, 7, 7))
    expected = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        weights = np.exp(0.25 * k[b, :, h] @ q[b, i, h])
        expected[b, i, h] = weights @ v[b, :, h] / weights.sum()
    np.testing.assert_allclose(attention(q, k, v, scale=0.25), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["gpu", "cudnn", "tokamax"])
def test_what_an_implementation_lacks_is_one_sentence(implementation):
    q = jax.ShapeDtypeStruct((1, 128, 1, 64), "float32")
    with pytest.raises(UserError, match=f"^attention={implementation}: .*float32"):
        jax.eval_shape(lambda q: attention(q, q, q, scale=1.0, implementation=implementation), q)
