"""Rectangles' tokens against a computation written here: by NumPy alone, and with PyTorch's pooling and bicubic."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from hart_jax.config import TokenizerConfig
from hart_jax.config.scales import Shape
from hart_jax.tokenizer.quantizer import Quantizer, Tokens, phi_index
from tests.tiny import random_like
from tests.tokenizer.test_quantizer import BATCH, CONFIG
from tests.tokenizer.test_resize import interpolated, pooled


def random_shapes(count: int) -> list[Shape]:
    """Heights and widths of latents with about as many tokens as the model's, of ratios from 1:4 to 4:1."""
    random = np.random.default_rng(17)
    ratios = np.exp(random.uniform(-np.log(4), np.log(4), count))
    sides = np.sqrt(random.uniform(48, 100, count))
    return [(round(side * root), round(side / root)) for side, root in zip(sides, np.sqrt(ratios), strict=True)]


SHAPES = random_shapes(5)


class Resizes(NamedTuple):
    """To a height and width, of an array (height, width)."""

    area: Callable[[np.ndarray, Shape], np.ndarray]
    bicubic: Callable[[np.ndarray, Shape], np.ndarray]


def along_both(resize: Callable[[np.ndarray, int], list[float]], x: np.ndarray, shape: Shape) -> np.ndarray:
    """One axis after the other, signal by signal."""
    rows = np.stack([resize(column, shape[0]) for column in x.T], axis=1)
    return np.stack([resize(row, shape[1]) for row in rows])


def torch_resizes() -> Resizes:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def area(x: np.ndarray, shape: Shape) -> np.ndarray:
        return functional.adaptive_avg_pool2d(torch.from_numpy(x)[None, None], shape)[0, 0].numpy()

    def bicubic(x: np.ndarray, shape: Shape) -> np.ndarray:
        return functional.interpolate(torch.from_numpy(x)[None, None], shape, mode="bicubic")[0, 0].numpy()

    return Resizes(area, bicubic)


NUMPY = Resizes(functools.partial(along_both, pooled), functools.partial(along_both, interpolated))


def convolved(x_hwC: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3x3, with zeros around."""
    height, width, _ = x_hwC.shape
    padded = np.pad(x_hwC, ((1, 1), (1, 1), (0, 0)))
    return bias + sum(padded[i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def expected(params: Any, f_hwC: np.ndarray, shapes: tuple[Shape, ...], resizes: Resizes) -> Tokens:
    """SPEC.md section 1, for one latent, in float64."""

    def each(resize: Callable[[np.ndarray, Shape], np.ndarray], x: np.ndarray, shape: Shape) -> np.ndarray:
        return np.stack([resize(np.ascontiguousarray(x[..., channel]), shape) for channel in range(x.shape[-1])], -1)

    codebook, kernels, biases = (
        np.asarray(params[name], np.float64) for name in ("codebook", "phi_kernel", "phi_bias")
    )
    rest, f_hat = f_hwC.astype(np.float64), np.zeros(f_hwC.shape)
    indices, inputs = [], []
    for scale, shape in enumerate(shapes):
        z_NC = each(resizes.area, rest, shape).reshape(-1, f_hwC.shape[-1])
        index = np.argmin(((z_NC[:, None] - codebook) ** 2).sum(-1), axis=1)
        indices.append(index)
        if scale == len(shapes) - 1:
            break
        h = each(resizes.bicubic, codebook[index].reshape(*shape, -1), shapes[-1])
        phi = phi_index(scale, len(shapes), len(kernels))
        h = 0.5 * h + 0.5 * convolved(h, kernels[phi], biases[phi])
        rest, f_hat = rest - h, f_hat + h
        inputs.append(each(resizes.area, f_hat, shapes[scale + 1]).reshape(-1, f_hwC.shape[-1]))
    return Tokens(tuple(indices), rest.reshape(-1, f_hwC.shape[-1]), np.concatenate(inputs))


@functools.cache
def params() -> Any:
    latent = jax.ShapeDtypeStruct((1, 8, 8, 4), "float32")
    shapes = jax.eval_shape(lambda x: Quantizer(CONFIG).init(jax.random.key(0), x, method="quantize"), latent)
    return random_like(jax.tree.map(lambda leaf: leaf.value, shapes["params"], is_leaf=lambda x: hasattr(x, "value")))


def tokens(config: TokenizerConfig, latent_BhwC: np.ndarray, params: Any) -> Tokens:
    run = jax.jit(lambda params, latent: Quantizer(config).apply({"params": params}, latent, method="tokens"))
    return jax.device_get(run(params, latent_BhwC))


def latent_of(shape: Shape) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal((BATCH, *shape, 4), np.float32)


def check(shape: Shape, resizes: Resizes) -> None:
    config, latent = CONFIG.of_latent(*shape), latent_of(shape)
    ours = tokens(config, latent, params())
    for image in range(BATCH):
        theirs = expected(params(), latent[image], config.shapes, resizes)
        for index, same in zip(ours.indices, theirs.indices, strict=True):
            np.testing.assert_array_equal(index[image], same)
        np.testing.assert_allclose(ours.f_rest_BPC[image], theirs.f_rest_BPC, atol=1e-5)
        np.testing.assert_allclose(ours.ar_input_BLC[image], theirs.ar_input_BLC, atol=1e-5)


def test_shapes_are_five_of_them():
    ratios = [height / width for height, width in SHAPES]
    assert len(set(ratios)) == 5 and 1 not in ratios
    assert 1 / 4 <= min(ratios) < 1 / 2 < 2 < max(ratios) <= 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_the_plain_computation(shape):
    check(shape, NUMPY)


@pytest.mark.torch
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_those_of_torch_resizing(shape):
    check(shape, torch_resizes())


def on_its_side(x_NC: np.ndarray, shape: Shape) -> np.ndarray:
    """Tokens (..., p*q, C) of a (p, q), row by row, as those of the (q, p)."""
    *batch, _, channels = x_NC.shape
    return np.swapaxes(x_NC.reshape(*batch, *shape, channels), -3, -2).reshape(*batch, -1, channels)


def test_a_latent_on_its_side_has_its_tokens_on_their_side():
    """2:3 and 3:2, with phi's kernels on their side too."""
    latent, (high, wide) = latent_of((10, 7)), (CONFIG.of_latent(10, 7), CONFIG.of_latent(7, 10))
    turned = {**params(), "phi_kernel": np.swapaxes(params()["phi_kernel"], 1, 2)}
    ours, theirs = tokens(high, latent, params()), tokens(wide, np.swapaxes(latent, 1, 2), turned)
    start = 0
    for scale, (index, other, shape) in enumerate(zip(ours.indices, theirs.indices, high.shapes, strict=True)):
        np.testing.assert_array_equal(on_its_side(index[..., None], shape)[..., 0], other)
        if scale:
            part = slice(start, start + high.sizes[scale])
            start = part.stop
            inputs = on_its_side(ours.ar_input_BLC[:, part], shape)
            np.testing.assert_allclose(inputs, theirs.ar_input_BLC[:, part], atol=1e-5)
    np.testing.assert_allclose(on_its_side(ours.f_rest_BPC, (10, 7)), theirs.f_rest_BPC, atol=1e-5)
    # Without them turned, something differs: phi is not the same in both directions.
    other = tokens(wide, np.swapaxes(latent, 1, 2), params())
    assert any((a != b).any() for a, b in zip(other.indices, theirs.indices, strict=True))
