"""The patch discriminator: shapes, statistics, names, and its losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.config import MIN_DISCRIMINATOR_PX
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.losses import hinge_discriminator, hinge_generator


@pytest.mark.parametrize("side", [MIN_DISCRIMINATOR_PX, 32, 64, 256])
def test_logits_are_of_patches(side):
    image = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    logits, variables = jax.eval_shape(Discriminator().init_with_output, jax.random.key(0), image)
    assert logits.shape == (2, side // 8 - 2, side // 8 - 2, 1)
    widths = [variables["params"][f"conv_{layer}"]["kernel"].value.shape for layer in range(5)]
    assert widths == [(4, 4, 3, 64), (4, 4, 64, 128), (4, 4, 128, 256), (4, 4, 256, 512), (4, 4, 512, 1)]


def test_below_the_smallest_size_no_patch_is_left():
    image = jax.ShapeDtypeStruct((1, MIN_DISCRIMINATOR_PX - 8, MIN_DISCRIMINATOR_PX - 8, 3), jnp.float32)
    logits, _ = jax.eval_shape(Discriminator().init_with_output, jax.random.key(0), image)
    assert 0 in logits.shape


def test_every_parameter_names_its_axes():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(Discriminator().init, jax.random.key(0), image)
    specs = jax.tree.leaves(nn.get_partition_spec(variables["params"]), is_leaf=lambda x: isinstance(x, jax.P))
    shapes = jax.tree.leaves(nn.unbox(variables["params"]))
    assert all(any(spec) and len(spec) == leaf.ndim for spec, leaf in zip(specs, shapes, strict=True))


def test_statistics_follow_the_batch_in_training_only():
    discriminator = Discriminator(filters=4)
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    variables = nn.unbox(jax.jit(discriminator.init)(jax.random.key(1), images))

    @functools.partial(jax.jit, static_argnames="train")
    def discriminate(train):
        return discriminator.apply(variables, images, train=train, mutable=["batch_stats"])

    frozen, unchanged = discriminate(train=False)
    jax.tree.map(np.testing.assert_array_equal, unchanged["batch_stats"], variables["batch_stats"])
    trained, updated = discriminate(train=True)
    assert np.abs(trained - frozen).max() > 0
    # Running averages keep 0.9 of the old value, as PyTorch's momentum 0.1 does.
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    first = nn.leaky_relu(conv(images, variables["params"]["conv_0"]["kernel"]), 0.2)
    second = conv(first, variables["params"]["conv_1"]["kernel"])
    mean = 0.1 * np.mean(second, axis=(0, 1, 2))
    np.testing.assert_allclose(updated["batch_stats"]["norm_1"]["mean"], mean, atol=1e-5)


def test_hinge_losses():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 1.0])
    np.testing.assert_allclose(hinge_discriminator(real, fake), 0.5 * (2.5 / 3 + 3.0 / 3), rtol=1e-6)
    np.testing.assert_allclose(hinge_generator(fake), 1.0 / 3, rtol=1e-6)
    assert hinge_discriminator(jnp.array([1.0, 5.0]), jnp.array([-1.0, -7.0])) == 0.0
