"""The package tokamax as an implementation of attention: what is said without it, and what its kernels get with it.

`test_attention.py` runs the conformance cases; kernels need a GPU and are traced and lowered here, where installed.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.attention_compiled import as_on_hopper
from hart_jax.nn.flop_counter import flops_of
from pallas_kernels.attention import attention, tokamax
from pallas_kernels.attention.conformance import CASES
from tests.kernels.test_attention import largest_array

installed = pytest.mark.skipif(not tokamax.installed(), reason="tokamax is not installed")
run = functools.partial(attention, implementation="tokamax")


def test_without_the_package_the_fix_is_named(monkeypatch):
    monkeypatch.setattr("pallas_kernels.attention.tokamax.installed", lambda: False)
    q = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"pip install tokamax==.*use implementation='cudnn'"):
        run(q, q, q, scale=1.0)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 64), ("bfloat16", 12), ("bfloat16", 136)])
def test_what_the_kernels_lack_is_named(dtype, width):
    q = jnp.zeros((1, 128, 1, width), dtype)
    with pytest.raises(NotImplementedError, match=f"got {dtype} and {width}; use implementation='xla'"):
        run(q, q, q, scale=1.0)


@installed
@pytest.mark.parametrize("traced", [False, True])
def test_kernels_lower_for_a_gpu_without_a_quadratic_array(traced):
    q = jax.ShapeDtypeStruct((1, 2000, 1, 64), "bfloat16")
    end = jax.ShapeDtypeStruct((2000,), "int32")

    def loss(q, k, v, end):
        kv_end = end if traced else ((1000, 1000), (1000, 2000))
        return run(q, k, v, kv_end=kv_end, scale=1.0).astype(jnp.float32).sum()

    with as_on_hopper():
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q, end)
        text = found.lower(lowering_platforms=("cuda",)).as_text()
    assert largest_array(found.jaxpr.jaxpr) <= 2048 * 128
    # Forward, dQ, and dK with dV.
    assert text.count("mosaic_gpu") >= 3


@installed
def test_it_counts_what_is_seen():
    case = CASES["scales"]
    *qkv, _ = case.arrays("bfloat16")

    def loss(*qkv):
        return run(*qkv, kv_end=case.kv_end, scale=1.0, interpret=True).astype(jnp.float32).sum()

    product = 2 * case.batch * case.heads * case.width * sum(size * end for size, end in case.kv_end)
    assert flops_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv).jaxpr) == (2 + 5) * product
