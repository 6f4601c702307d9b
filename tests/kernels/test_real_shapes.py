"""Every implementation of attention against the reference at the shapes that HART has."""

import dataclasses
import functools

import numpy as np
import pytest

from pallas_kernels.attention import attention
from pallas_kernels.attention.shapes import SHAPES
from tests.kernels.test_attention import BOUNDS, GPU, SPLASH, TESTED, TPU, XLA, Case, assert_near, gradients

pytestmark = pytest.mark.slow

# Interpreted, the largest take minutes: each of them once. `test_tiles.py` has the tiles of all shapes.
SMALLER = ("256", "256 half", "512", "512 half")
ONLY = {
    XLA: (*SMALLER, "1024"),
    TPU: (*SMALLER, "1024 decode", "1024 2:3"),
    SPLASH: ("512", "1024 half", "1024 16:9"),
    GPU: SMALLER[:2],
}


def case_of(name: str) -> Case:
    shape = SHAPES[name]
    return Case(shape.queries, shape.keys, shape.segments, heads=1, groups=1, batch=1)


@functools.cache
def expected(name: str, dtype: str) -> list[np.ndarray]:
    return gradients(functools.partial(attention, implementation="reference"), case_of(name), dtype)


@pytest.mark.parametrize(
    ("name", "run"),
    [pytest.param(name, run, id=f"{run.name}-{name}") for name in SHAPES for run in TESTED if name in ONLY[run]],
)
def test_real_shapes(name, run):
    tiles = 128 if run is GPU else 1024 if SHAPES[name].keys > 4000 else 256
    run = dataclasses.replace(run, rows=min(run.rows * 8, tiles), keys=tiles)
    dtype = "bfloat16" if "half" in name else run.types[0]
    assert_near(gradients(run, case_of(name), dtype), expected(name, dtype), BOUNDS[dtype])
