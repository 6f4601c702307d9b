"""FID's InceptionV3 with random weights, by the names of the published file; shared by tests."""

from collections.abc import Iterator

import numpy as np


def inception_layers() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(output, input channels, window's height, width) of every convolution, by torchvision's names."""

    def chain(name, channels, *layers):
        for number, (width, *window) in enumerate(layers, 1):
            yield f"{name}_{number}", (width, channels, *window)
            channels = width

    def mixed5(channels, pool):
        yield "branch1x1", (64, channels, 1, 1)
        yield from chain("branch5x5", channels, (48, 1, 1), (64, 5, 5))
        yield from chain("branch3x3dbl", channels, (64, 1, 1), (96, 3, 3), (96, 3, 3))
        yield "branch_pool", (pool, channels, 1, 1)

    def mixed6a(channels):
        yield "branch3x3", (384, channels, 3, 3)
        yield from chain("branch3x3dbl", channels, (64, 1, 1), (96, 3, 3), (96, 3, 3))

    def mixed6(channels, inner):
        yield "branch1x1", (192, channels, 1, 1)
        yield from chain("branch7x7", channels, (inner, 1, 1), (inner, 1, 7), (192, 7, 1))
        layers = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
        yield from chain("branch7x7dbl", channels, *layers)
        yield "branch_pool", (192, channels, 1, 1)

    def mixed7a(channels):
        yield from chain("branch3x3", channels, (192, 1, 1), (320, 3, 3))
        yield from chain("branch7x7x3", channels, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))

    def mixed7(channels):
        yield "branch1x1", (320, channels, 1, 1)
        yield from chain("branch3x3", channels, (384, 1, 1))
        yield from chain("branch3x3dbl", channels, (448, 1, 1), (384, 3, 3))
        for name in ("branch3x3_2", "branch3x3dbl_3"):
            yield f"{name}a", (384, 384, 1, 3)
            yield f"{name}b", (384, 384, 3, 1)
        yield "branch_pool", (192, channels, 1, 1)

    yield "Conv2d_1a_3x3", (32, 3, 3, 3)
    yield "Conv2d_2a_3x3", (32, 32, 3, 3)
    yield "Conv2d_2b_3x3", (64, 32, 3, 3)
    yield "Conv2d_3b_1x1", (80, 64, 1, 1)
    yield "Conv2d_4a_3x3", (192, 80, 3, 3)
    blocks = {
        "5b": mixed5(192, 32),
        "5c": mixed5(256, 64),
        "5d": mixed5(288, 64),
        "6a": mixed6a(288),
        "6b": mixed6(768, 128),
        "6c": mixed6(768, 160),
        "6d": mixed6(768, 160),
        "6e": mixed6(768, 192),
        "7a": mixed7a(768),
        "7b": mixed7(1280),
        "7c": mixed7(2048),
    }
    for block, layers in blocks.items():
        for name, shape in layers:
            yield f"Mixed_{block}.{name}", shape


def inception_tensors() -> dict[str, np.ndarray]:
    """A state dict with random weights that keep activations of order one."""
    rng = np.random.default_rng(0)

    def uniform(shape, low, high):
        return low + (high - low) * rng.random(shape, np.float32)

    tensors = {}
    for name, shape in inception_layers():
        # Uniform between these has He's variance of 2 / fan-in.
        bound = np.float32(np.sqrt(6 / np.prod(shape[1:])))
        tensors[f"{name}.conv.weight"] = uniform(shape, -bound, bound)
        tensors[f"{name}.bn.weight"] = uniform(shape[0], 0.7, 1.3)
        tensors[f"{name}.bn.bias"] = uniform(shape[0], -0.3, 0.3)
        tensors[f"{name}.bn.running_mean"] = uniform(shape[0], -0.3, 0.3)
        tensors[f"{name}.bn.running_var"] = uniform(shape[0], 0.5, 1.5)
    tensors["fc.weight"] = uniform((1008, 2048), -0.05, 0.05)
    tensors["fc.bias"] = uniform(1008, -1, 1)
    return tensors
