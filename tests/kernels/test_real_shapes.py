"""Every implementation of attention against the reference at the shapes that HART has."""

import dataclasses
import functools

import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.attention.shapes import SHAPES
from tests.kernels.test_attention import BOUNDS, GPU, SPLASH, TESTED, Case, assert_near, gradients

# What takes minutes otherwise, or is a library's own.
ONLY = {GPU: ("256", "256 half"), SPLASH: ("512", "1024 half")}


def case_of(name: str) -> Case:
    shape = SHAPES[name]
    return Case(shape.queries, shape.keys, shape.segments, heads=1, groups=1, batch=1)


@functools.cache
def expected(name: str, dtype: str) -> list[np.ndarray]:
    return gradients(functools.partial(attention, implementation="reference"), case_of(name), dtype)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        pytest.param(name, run, id=f"{run.name}-{name}")
        for name in SHAPES
        for run in TESTED
        if name in ONLY.get(run, tuple(SHAPES))
    ],
)
def test_real_shapes(name, run):
    tiles = 128 if run is GPU else 1024 if SHAPES[name].keys > 4000 else 256
    run = dataclasses.replace(run, rows=min(run.rows * 8, tiles), keys=tiles)
    dtype = "bfloat16" if "half" in name else run.types[0]
    assert_near(gradients(run, case_of(name), dtype), expected(name, dtype), BOUNDS[dtype])
