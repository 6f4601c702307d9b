"""Resizing between scales against an independent definition, committed numbers, and PyTorch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.tokenizer.resize import area, area_matrix, bicubic, bicubic_matrix

# What F.adaptive_avg_pool2d makes of 0 1 4 9 16, and F.interpolate(mode="bicubic") of 0 2 10.
RAMP = np.arange(5.0) ** 2
AREA_5_TO_3 = [0.5, 14 / 3, 12.5]
BICUBIC_3_TO_5 = [-0.192, 0.2, 2.0, 7.04, 10.768]
BICUBIC_RAMP = np.array([0.0, 2.0, 10.0])


def pooled(signal: np.ndarray, size_out: int) -> list[float]:
    """Means over windows from floor(i n / m) to ceil((i + 1) n / m)."""
    size_in = len(signal)
    edges = ((math.floor(i * size_in / size_out), math.ceil((i + 1) * size_in / size_out)) for i in range(size_out))
    return [float(np.mean(signal[start:stop])) for start, stop in edges]


def keys_kernel(x: float, a: float = -0.75) -> float:
    """The cubic convolution kernel (Keys, 1981)."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(signal: np.ndarray, size_out: int) -> list[float]:
    """The kernel over all samples of the signal continued by its end values, at half-pixel centres."""
    size_in = len(signal)
    padded = np.pad(signal, 3, mode="edge")
    centres = ((i + 0.5) * size_in / size_out - 0.5 for i in range(size_out))
    return [sum(keys_kernel(c - (k - 3)) * v for k, v in enumerate(padded)) for c in centres]


def square(signal_rows: np.ndarray, signal_columns: np.ndarray) -> np.ndarray:
    return np.outer(signal_rows, signal_columns)[None, :, :, None].astype(np.float32)


sizes = st.integers(1, 12)
values = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(sizes, sizes, values)
@settings(deadline=None)
def test_area_is_the_mean_over_windows(size_in, size_out, rng):
    signal = rng.normal(size=size_in)
    np.testing.assert_allclose(area_matrix(size_in, size_out) @ signal, pooled(signal, size_out), atol=1e-6)


@given(sizes, st.integers(1, 32), values)
@settings(deadline=None)
def test_bicubic_is_the_kernel_at_half_pixel_centres(size_in, size_out, rng):
    signal = rng.normal(size=size_in)
    np.testing.assert_allclose(bicubic_matrix(size_in, size_out) @ signal, interpolated(signal, size_out), atol=1e-6)


@given(sizes, st.integers(1, 32))
@settings(deadline=None)
def test_constants_stay(size_in, size_out):
    for matrix in (area_matrix(size_in, size_out), bicubic_matrix(size_in, size_out)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)


def test_area_committed():
    rows = np.array([2.0, 1.0, 0.0, -1.0, -2.0])
    expected = np.outer([1.5, 0.0, -1.5], AREA_5_TO_3)
    np.testing.assert_allclose(area(square(rows, RAMP), (3, 3))[0, :, :, 0], expected, atol=1e-6)


def test_bicubic_committed():
    ones = np.ones(3)
    expected = np.outer(np.ones(5), BICUBIC_3_TO_5)
    np.testing.assert_allclose(bicubic(square(ones, BICUBIC_RAMP), (5, 5))[0, :, :, 0], expected, atol=2e-6)
    np.testing.assert_allclose(bicubic(square(BICUBIC_RAMP, ones), (5, 5))[0, :, :, 0], expected.T, atol=2e-6)


def test_same_shape_is_untouched():
    x = square(RAMP, RAMP)
    assert area(x, (5, 5)) is x and bicubic(x, (5, 5)) is x


def test_one_side_alone():
    """Rows that stay are the same to the bit: their matrix is that of the identity."""
    x = np.random.default_rng(0).normal(size=(1, 5, 6, 2)).astype(np.float32)
    for resize, matrix in ((area, area_matrix), (bicubic, bicubic_matrix)):
        np.testing.assert_array_equal(matrix(5, 5), np.eye(5))
        rows = [resize(x[:, row : row + 1], (1, 4)) for row in range(5)]
        np.testing.assert_allclose(resize(x, (5, 4)), np.concatenate(rows, axis=1), atol=1e-6)


def test_batch_and_channels_are_kept_apart():
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    for resize in (area, bicubic):
        whole = resize(x, (3, 4))
        assert whole.shape == (2, 3, 4, 3)
        for image in range(2):
            for channel in range(3):
                alone = resize(x[image : image + 1, :, :, channel : channel + 1], (3, 4))
                np.testing.assert_allclose(whole[image, :, :, channel], alone[0, :, :, 0], atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [((16, 16), (13, 13)), ((16, 16), (1, 1)), ((64, 64), (48, 48)), ((6, 10), (4, 5)), ((48, 85), (36, 64))],
)
def test_area_is_torch_adaptive_pooling(size_in, size_out):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, *size_in, 2)).astype(np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2)), size_out)
    np.testing.assert_allclose(area(x, size_out), theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [((1, 1), (16, 16)), ((5, 5), (16, 16)), ((48, 48), (64, 64)), ((4, 5), (6, 10)), ((2, 3), (48, 85))],
)
def test_bicubic_is_torch_interpolation(size_in, size_out):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, *size_in, 2)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2)), size_out, mode="bicubic", align_corners=False
    )
    np.testing.assert_allclose(bicubic(x, size_out), theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5)
