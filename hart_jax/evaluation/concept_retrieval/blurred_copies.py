"""Images without their finest details, as small models make them: copies for a space to overlook the difference."""

import jax
import jax.numpy as jnp


def blurred_copies(images_BHWC: jax.Array) -> jax.Array:
    """uint8 images reduced to a half or to a quarter of their height and width, and enlarged again.

    Which of the two is chosen by an image's own pixels, the parity of their sum: the same in whatever batch.
    """
    odd_B = jnp.sum(images_BHWC.astype(jnp.int32), axis=(1, 2, 3)) % 2 == 1
    images = jnp.where(odd_B[:, None, None, None], _reduced(images_BHWC, 2), _reduced(images_BHWC, 4))
    return jnp.clip(jnp.rint(images), 0, 255).astype(jnp.uint8)


def _reduced(images_BHWC: jax.Array, factor: int) -> jax.Array:
    batch, height, width, channels = images_BHWC.shape
    small = batch, -(-height // factor), -(-width // factor), channels
    images = jax.image.resize(images_BHWC.astype(jnp.float32), small, "linear")
    return jax.image.resize(images, images_BHWC.shape, "cubic")
