"""The kernels for GPUs, interpreted: JAX has that from 0.12 on, and it needs more threads than there are cores."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import attention


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="this JAX cannot interpret kernels for GPUs")
def test_conformance():
    here = Path(__file__).parent
    files = [str(here / "test_attention.py"), str(here / "test_real_shapes.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    chosen = ["-k", "is_the_reference or real_shapes"]
    # XLA's threads wait for each other inside a kernel: NPROC is how many there are.
    environment = {**os.environ, "HART_INTERPRET_GPU": "1", "NPROC": "16"}
    done = subprocess.run(
        [*command, *chosen], cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "float32"}, "float32"), ({"width": 256}, "256"), ({"scale": -1.0}, "scale")],
    ids=["type", "width", "scale"],
)
def test_what_the_kernels_lack_is_named(changes, message):
    settings = {"dtype": "bfloat16", "width": 64, "scale": 0.1} | changes
    q = jnp.zeros((1, 64, 1, settings["width"]), settings["dtype"])
    with pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, scale=settings["scale"], implementation="gpu")
