"""Every implementation of attention against the reference: values and all three gradients, whatever is asked of it."""

import dataclasses
import functools
import os
import types
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.extend.core import jaxprs_in_params

from hart_jax.config import ATTENTION
from hart_jax.nn.flop_counter import flops_of
from pallas_kernels.attention import IMPLEMENTATIONS, Blocks, attention, tokamax
from pallas_kernels.attention.conformance import BOUNDS, CASES, Case, ends, errors, gradients


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A name, tiles that are small enough to be several, and what it can do."""

    name: str
    rows: int
    keys: int
    types: tuple[str, ...] = ("float32", "bfloat16", "float16")
    traced: bool = True

    def __call__(self, q, k, v, **arguments) -> jax.Array:
        tiles = self.rows, self.keys
        interpret = self.name != "xla"
        blocks = Blocks(tiles, tiles, tiles)
        return attention(q, k, v, implementation=self.name, blocks=blocks, interpret=interpret, **arguments)


XLA = Implementation("xla", 32, 64)
TPU = Implementation("tpu", 128, 128)
SPLASH = Implementation("splash", 128, 128, traced=False)
GPU = Implementation("gpu", 64, 64, types=("bfloat16", "float16"))
# `test_gpu.py` runs this file for it.
# Its plain attention has no float16 on a CPU.
TOKAMAX = Implementation("tokamax", 64, 64, types=("bfloat16",))
TESTED = (GPU,) if os.environ.get("HART_INTERPRET_GPU") else (XLA, TPU, SPLASH)
every_implementation = pytest.mark.parametrize("run", TESTED, ids=lambda run: run.name)
# Of the package tokamax, where it is installed, the plain attention runs here, given the mask that its kernels get.
LIBRARY = (TOKAMAX,) if tokamax.installed() and GPU not in TESTED else ()


@functools.cache
def expected(name: str, dtype: str) -> list[np.ndarray]:
    case = CASES[name]
    return gradients(functools.partial(attention, implementation="reference"), case, dtype)


def assert_near(ours: list[np.ndarray], theirs: list[np.ndarray], bound: float) -> None:
    found = errors(ours, theirs)
    assert max(found.values()) <= bound, found


@pytest.mark.parametrize(
    ("run", "name", "dtype"),
    [
        pytest.param(run, name, dtype, id=f"{run.name}-{name}-{dtype}")
        for run in (*TESTED, *LIBRARY)
        for name, case in CASES.items()
        for dtype in (case.dtypes if "float32" in run.types else ("bfloat16", *case.dtypes[2:]))
        if dtype in run.types and (run.traced or not isinstance(case.kv_end, np.ndarray))
    ],
)
def test_is_the_reference(run, name, dtype):
    assert_near(gradients(run, CASES[name], dtype), expected(name, dtype), BOUNDS[dtype])


@st.composite
def segments(draw) -> tuple[tuple[int, int], ...]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return tuple((size, draw(st.integers(1, 90))) for size in sizes)


@given(segments())
@settings(max_examples=8)
def test_any_segments(drawn):
    case = Case(sum(size for size, _ in drawn), 90, drawn, width=8, batch=1)
    run = functools.partial(attention, implementation="reference")
    assert_near(gradients(XLA, case, "float32"), gradients(run, case, "float32"), BOUNDS["float32"])


@functools.cache
def compiled(run):
    """For ends that are traced, so that another list of them is no other compilation."""
    case = Case(200, 200, batch=1, heads=1, groups=1, width=32)
    *qkv, dout = case.arrays("float32")

    def both(kv_end):
        out, pull = jax.vjp(lambda *qkv: run(*qkv, kv_end=kv_end, scale=case.scale), *qkv)
        return out, *pull(dout)

    return jax.jit(both)


@pytest.mark.parametrize("run", [XLA, TPU], ids=lambda run: run.name)
def test_any_ends(run):
    reference = functools.partial(attention, implementation="reference")

    @given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 200)), min_size=1, max_size=9))
    @settings(max_examples=20 if run is XLA else 6)
    def check(drawn):
        end_Q = np.resize(np.repeat([end for _, end in drawn], [size for size, _ in drawn]), 200).astype(np.int32)
        ours, theirs = ([np.asarray(x) for x in compiled(which)(end_Q)] for which in (run, reference))
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(a - b).max() <= BOUNDS["float32"] * max(1.0, np.abs(b).max())

    check()


@pytest.mark.parametrize("run", [XLA, TPU], ids=lambda run: run.name)
def test_transformations(run):
    """vmap over queries and ends, a scan, and rematerialisation, all at once, against a loop."""
    case = Case(70, 70, batch=3)
    q, k, v, dout = case.arrays("float32")
    end_NQ = ends(3, 70, most=70)

    def loss(run, q, k, v, dout, end_Q):
        def step(x, _):
            return run(x[None], k[None], v[None], kv_end=end_Q, scale=0.3)[0] + x, None

        # Interpreted kernels have effects, which rematerialisation refuses.
        step = step if run is TPU else jax.checkpoint(step)
        return jnp.sum(jax.lax.scan(step, q, length=2)[0] * dout)

    reference = functools.partial(attention, implementation="reference")
    mapped = jax.vmap(jax.grad(functools.partial(loss, run), argnums=(0, 1, 2)), in_axes=(0, None, None, 0, 0))
    ours = jax.jit(mapped)(q, k[0], v[0], dout, end_NQ)
    for sample in range(3):
        one = jax.grad(functools.partial(loss, reference), argnums=(0, 1, 2))
        theirs = one(q[sample], k[0], v[0], dout[sample], end_NQ[sample])
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a[sample], b, rtol=2e-5, atol=2e-5)


def largest_array(jaxpr: Any) -> int:
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [jaxpr for equation in jaxpr.eqns for jaxpr in jaxprs_in_params(equation.params)]
    return max([*sizes, *map(largest_array, inner)], default=0)


@every_implementation
def test_no_array_is_quadratic(run):
    case = Case(2000, 2000, heads=1, groups=1, batch=1, width=32)
    *qkv, _ = case.arrays("float32")

    def loss(*qkv):
        return run(*qkv, kv_end=((1000, 1000), (1000, 2000)), scale=1.0).sum()

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)
    assert largest_array(traced.jaxpr) <= 2048 * max(32, run.keys)


def test_static_segments_cost_what_they_see():
    """Of the matrix products of both passes, nothing is masked where pieces are whole segments."""
    case = Case(2048, 2048, ((1024, 1024), (1024, 2048)), batch=1, heads=1, groups=1, width=32)
    *qkv, _ = case.arrays("float32")

    def loss(*qkv):
        return XLA(*qkv, kv_end=case.kv_end, scale=1.0).sum()

    pairs = 1024 * 1024 + 1024 * 2048
    assert flops_of(jax.make_jaxpr(loss)(*qkv).jaxpr) == 2 * 2 * 32 * pairs
    assert flops_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv).jaxpr) == (2 + 5) * 2 * 32 * pairs


def test_a_library_s_kernel_counts_what_is_seen():
    case = CASES["scales"]
    *qkv, _ = case.arrays("float32")

    def loss(*qkv):
        return SPLASH(*qkv, kv_end=case.kv_end, scale=1.0).sum()

    product = 2 * case.batch * case.heads * case.width * sum(size * end for size, end in case.kv_end)
    assert flops_of(jax.make_jaxpr(loss)(*qkv).jaxpr) == 2 * product
    assert flops_of(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv).jaxpr) == (2 + 5) * product


def test_names_are_those_of_the_configs():
    assert IMPLEMENTATIONS == ATTENTION


@pytest.mark.parametrize(
    ("platform", "dtype", "queries", "expected"),
    [
        ("cpu", "bfloat16", 128, "dot_general"),
        ("tpu", "bfloat16", 128, "pallas_call"),
        ("tpu", "float32", 128, "dot_general"),
        ("tpu", "bfloat16", 9, "dot_general"),
        ("gpu", "float32", 128, "dot_general"),
    ],
)
def test_auto_is_what_is_known_to_work_on_the_device(monkeypatch, platform, dtype, queries, expected):
    """What whole programs take in bfloat16 on TPUs and GPUs, `tests/test_lowering.py` sees in them."""
    device = types.SimpleNamespace(platform=platform, device_kind=platform)
    monkeypatch.setattr("pallas_kernels.attention._device", lambda: device)
    q, k = (jax.ShapeDtypeStruct((1, length, 1, 64), dtype) for length in (queries, 200))
    traced = jax.make_jaxpr(functools.partial(attention, scale=0.3))(q, k, k)
    assert expected in str(traced)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 5, 3)}, r"q \(2, 5, 3\).*must be \(B, Q, H, K\)"),
        ({"v": (2, 7, 2, 8)}, "must be"),
        ({"q": (2, 5, 3, 4)}, "heads of k and v divide those of q"),
        ({"q": (2, 5, 2, 8)}, "widths must be the same"),
        ({"kv_end": ((2, 6),)}, "does not cover the 5 queries"),
        ({"kv_end": ((5, 7),)}, r"ends in 1\.\.6"),
        ({"kv_end": ((4, 2), (1, 0))}, r"ends in 1\.\.6"),
        ({"kv_end": np.zeros(4, np.int32)}, r"must be integers, \(Q,\) or \(B, Q\)"),
        ({"kv_end": np.zeros(5)}, "must be integers"),
        ({"implementation": "flash"}, "must be one of auto, reference, xla"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    shapes = {"q": (2, 5, 2, 4), "k": (2, 6, 2, 4), "v": (2, 6, 2, 4)}
    arguments = {name: np.zeros(changes.get(name, shape), np.float32) for name, shape in shapes.items()}
    settings = {name: value for name, value in changes.items() if name not in shapes}
    with pytest.raises(ValueError, match=message):
        attention(*arguments.values(), scale=1.0, **settings)


def test_types_must_be_the_same():
    q, k = jnp.zeros((1, 2, 1, 8), jnp.bfloat16), jnp.zeros((1, 2, 1, 8))
    with pytest.raises(ValueError, match="q bfloat16, k float32"):
        attention(q, k, k, scale=1.0)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_what_an_implementation_lacks_is_named(name):
    q = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"{name}: .*static segments; use implementation='xla'"):
        attention(q, q, q, scale=1.0, kv_end=jnp.full(128, 5), implementation=name)
