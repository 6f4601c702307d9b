import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hart_jax.evaluation.metrics.ssim import ssim

# scikit-image 0.26.0, structural_similarity of (image + 1) / 2 in float64 with the arguments in `ssim`'s docstring.
PUBLISHED = {
    "shifted": 0.8720337261055423,
    "noisy": 0.917963271091709,
    "noise": 0.03179672314111126,
    "negative": -0.6653615699250252,
    "darker": 0.6433588734116548,
    "white and black": 9.999000099989997e-05,
    "white and nearly white": 0.9650664599766428,
}


def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    y, x, c = np.meshgrid(np.arange(24), np.arange(17), np.arange(3), indexing="ij")
    smooth = 0.9 * np.sin(0.35 * y + 0.2 * x * (c + 1))
    noise = (73 * y + 179 * x + 283 * c + 11 * x * y) % 97 / 48 - 1
    made = {
        "shifted": (smooth, np.roll(smooth, 1, axis=1)),
        "noisy": (smooth, 0.8 * smooth + 0.2 * noise),
        "noise": (smooth, noise),
        "negative": (smooth, -smooth),
        "darker": (smooth, 0.5 * smooth - 0.5),
        "white and black": (np.ones_like(smooth), -np.ones_like(smooth)),
        "white and nearly white": (np.ones_like(smooth), 1 + 0.02 * (noise - 1)),
    }
    return {name: (a.astype(np.float32), b.astype(np.float32)) for name, (a, b) in made.items()}


def naive(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    def blur(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, sigma=1.5, radius=5, axes=(0, 1))[5:-5, 5:-5]

    a, b = ((image.astype(np.float64) + 1) / 2 for image in (a_HWC, b_HWC))
    means = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - means[0] ** 2, blur(b * b) - means[1] ** 2, blur(a * b) - means[0] * means[1]
    similar = (2 * means[0] * means[1] + 1e-4) * (2 * cov + 9e-4)
    return float(np.mean(similar / ((means[0] ** 2 + means[1] ** 2 + 1e-4) * (var_a + var_b + 9e-4))))


def test_it_is_that_of_scikit_image():
    a, b = (np.stack(images) for images in zip(*pairs().values(), strict=True))
    ours = jax.jit(ssim)(a, b)
    assert ours.shape == (len(PUBLISHED),) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, list(PUBLISHED.values()), atol=2e-6)
    np.testing.assert_allclose(ours, jax.jit(ssim)(b, a), atol=1e-6)


@pytest.mark.parametrize("shape", [(11, 11, 3), (12, 19, 1)])
def test_it_is_the_definition(shape):
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 3, *shape)).astype(np.float32)
    b = (a + b) / 2
    np.testing.assert_allclose(jax.jit(ssim)(a, b), [naive(*pair) for pair in zip(a, b, strict=True)], atol=2e-6)


def test_the_same_image_is_at_one():
    a = np.stack([a for a, _ in pairs().values()])
    np.testing.assert_allclose(jax.jit(ssim)(a, a), 1, atol=1e-6)


@pytest.mark.parametrize("other", [(1, 16, 10, 3), (1, 16, 12, 3)])
def test_images_it_cannot_compare(other):
    with pytest.raises(ValueError, match="11 px or more"):
        ssim(np.zeros((1, 16, 10, 3)), np.zeros(other))
