import jax.numpy as jnp
import numpy as np

from hart_jax.evaluation.concept_retrieval.blurred_copies import blurred_copies


def test_blurred_copies_lose_the_finest_details_alone():
    rows = np.indices((2, 9, 24, 3))[2]
    stripes, wide, even = rows % 2 * 200, rows // 3 % 2 * 200, np.full(rows.shape, 77)
    # Of two copies the second has a pixel's sum more: another lot.
    for images in (stripes, wide, even):
        images[1, 0, 0, 0] += 1
    soft = [np.asarray(blurred_copies(jnp.asarray(images, jnp.uint8)), float) for images in (stripes, wide, even)]
    soft = [images[:, 2:, 4:-4] for images in soft]
    assert np.ptp(soft[0]) < 10 and abs(soft[0].mean() - 100) < 1
    contrasts = sorted(np.ptp(soft[1], axis=(1, 2, 3)))
    assert contrasts[0] < 60 < 120 < contrasts[1]
    np.testing.assert_array_equal(soft[2], 77)
    slow = np.broadcast_to(np.linspace(0, 255, 64)[:, None], (1, 9, 64, 3)).astype(np.uint8)
    assert np.abs(np.asarray(blurred_copies(jnp.asarray(slow)), float) - slow)[:, :, 4:-4].max() <= 3


def test_a_blurred_copy_is_the_same_in_whatever_batch():
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3)).astype(np.uint8)
    together = np.asarray(blurred_copies(jnp.asarray(images)))
    for index, image in enumerate(images):
        np.testing.assert_array_equal(np.asarray(blurred_copies(jnp.asarray(image[None])))[0], together[index])
