"""Pictures without their finest details, as small models draw them: copies for a space to overlook the difference."""

import jax
import jax.numpy as jnp


def softened(images_BHWC: jax.Array) -> jax.Array:
    """uint8 pictures reduced to half their height and width, and enlarged again."""
    batch, height, width, channels = images_BHWC.shape
    small = batch, -(-height // 2), -(-width // 2), channels
    images = jax.image.resize(images_BHWC.astype(jnp.float32), small, "linear")
    images = jax.image.resize(images, images_BHWC.shape, "cubic")
    return jnp.clip(jnp.rint(images), 0, 255).astype(jnp.uint8)
