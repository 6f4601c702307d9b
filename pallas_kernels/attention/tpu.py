"""Flash attention for TPUs, in Pallas (Mosaic): one kernel forward, and one backward for dQ, dK and dV together.

The grid is (batch, heads, visits): a schedule in scalar memory names the two tiles of each visit, so that what no query
sees costs nothing. Arrays lie width first, (K, L), and scores keys first, (keys, queries): no head width pads lanes,
what there is one of a query is a row, the largest of its scores is found across registers rather than within them, and
weights stand still in the matrix unit while only K rows pass them, where K columns would waste half of its width at 64.

Measured in bundles of the compiler's schedule (libtpu 0.0.42) for 1,024 scores, bfloat16, K = 64, tiles of (512, 1024):

    forward     queries first 4.8, keys first 3.7 (v5e); 4.0, 2.5 (v6e)
    backward    dQ apart from dK and dV 10.2, together 6.3 (v5e); 6.4, 3.8 (v6e)
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import tiles
from pallas_kernels.attention.flash import Kernels, Static

# The score of a key that is not seen: finite, so that a difference of two is not NaN.
UNSEEN = -1e30
LOG2_E = math.log2(math.e)
# What a visit is, as bits; 0 behind the last one of a batch row.
LIVE, FIRST, LAST, MASKED = 1, 2, 4, 8
# Keys of a tile that are worked on at a time: exponentials of one part fill the gaps between products of the next.
PART = 256
# dQ of a head stays in VMEM, of which all TPUs have 16 MiB, while its sum in float32 and two buffers of the result fit
# in this; beyond, dQ has a kernel of its own.
RESIDENT_BYTES = 10 * 2**20


def forward(q_BHQK, k_BGMK, v_BGMK, end_RQ, static: Static) -> tuple[jax.Array, jax.Array]:
    q, k, v = (_width_first(x) for x in (q_BHQK, k_BGMK, v_BGMK))
    batch, heads, width, length = q.shape
    tile = static.blocks.forward
    steps = _Steps(end_RQ, q, k, tile, by_keys=False)
    queries, keys = steps.queries(width), steps.keys(width)
    out, lse = steps.call(
        functools.partial(_forward_kernel, scale=static.scale),
        "attention_forward",
        inputs=[(queries, q), (keys, k), (keys, v)],
        outputs=[
            (queries, jax.ShapeDtypeStruct(q.shape, v.dtype)),
            (steps.queries(1), jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)),
        ],
        scratch=[pltpu.VMEM((rows, tile[0]), jnp.float32) for rows in (1, 1, width)],
        products=2,
        interpret=static.interpret,
    )
    return jnp.swapaxes(out, 2, 3).astype(v_BGMK.dtype), lse[:, :, 0]


def backward(
    q_BHQK, k_BGMK, v_BGMK, lse_BHQ, delta_BHQ, dout_BHQK, end_RQ, static: Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v, dout = (_width_first(x) for x in (q_BHQK, k_BGMK, v_BGMK, dout_BHQK))
    batch, heads, width, length = q.shape
    dq_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    # Heads of a group are summed below.
    dk_type = k.dtype if heads == k.shape[1] else jnp.float32
    dk_shape = jax.ShapeDtypeStruct((batch, heads, width, k.shape[3]), dk_type)

    def run(name: str, tile: tuple[int, int], gradients: tuple[str, ...]) -> list[jax.Array]:
        steps = _Steps(end_RQ, q, k, tile, by_keys="dk" in gradients)
        queries, keys, row = steps.queries(width), steps.keys(width), steps.queries(1)
        dq = steps.all_queries(width) if "dk" in gradients else queries
        dk = steps.keys(width, shared=False)
        outputs = {"dq": (dq, dq_shape), "dk": (dk, dk_shape), "dv": (dk, dk_shape)}
        lengths = {"dq": length if "dk" in gradients else tile[0], "dk": tile[1], "dv": tile[1]}
        return steps.call(
            functools.partial(_backward_kernel, scale=static.scale, gradients=gradients),
            name,
            inputs=[
                *((queries, q), (keys, k), (keys, v), (queries, dout)),
                *((row, x[:, :, None]) for x in (lse_BHQ, delta_BHQ)),
            ],
            outputs=[outputs[name] for name in gradients],
            scratch=[pltpu.VMEM((width, lengths[name]), jnp.float32) for name in gradients],
            products=2 + len(gradients),
            interpret=static.interpret,
        )

    if width * length * (4 + 2 * q.dtype.itemsize) <= RESIDENT_BYTES:
        dq, dk, dv = run("attention_backward", static.blocks.dkv, ("dq", "dk", "dv"))
    else:
        (dq,) = run("attention_dq", static.blocks.dq, ("dq",))
        dk, dv = run("attention_dkv", static.blocks.dkv, ("dk", "dv"))
    dk, dv = (x.reshape(batch, k.shape[1], -1, *x.shape[2:]).sum(2) for x in (dk, dv))
    dq, dk, dv = (jnp.swapaxes(x, 2, 3) for x in (dq, dk, dv))
    return dq.astype(q_BHQK.dtype), dk.astype(k_BGMK.dtype), dv.astype(v_BGMK.dtype)


def _width_first(x_BHLK: jax.Array) -> jax.Array:
    """(B, H, K, L); float16, of which Mosaic has no products, as float32."""
    return jnp.swapaxes(x_BHLK.astype(jnp.float32) if x_BHLK.dtype == jnp.float16 else x_BHLK, 2, 3)


class _Steps:
    """The grid: visits of tiles, and which block of an array comes to each.

    Visits go through the tiles of keys for each tile of queries, or the other way round (`by_keys`).
    """

    def __init__(self, end_RQ: Any, q: jax.Array, k: jax.Array, tile: tuple[int, int], by_keys: bool):
        xp: Any = np if isinstance(end_RQ, np.ndarray) else jnp
        self.shape, self.group, self.tile = q.shape, q.shape[1] // k.shape[1], tile
        self.end_R1Q = jnp.asarray(end_RQ)[:, None]
        of = tiles.tiles_of(end_RQ, k.shape[3], *tile)
        outer, inner, count = tiles.by_keys(of) if by_keys else tiles.by_queries(of)
        queries, keys = (inner, outer) if by_keys else (outer, inner)
        self.rows, self.most = outer.shape
        live = xp.arange(self.most) < count[:, None]
        first = xp.diff(outer, axis=1, prepend=-1) != 0
        last = (xp.diff(outer, axis=1, append=-1) != 0) | (xp.arange(self.most) == count[:, None] - 1)
        masked = keys >= xp.take_along_axis(of.whole_RT, queries, axis=1)
        kind = xp.where(live, LIVE + FIRST * first + LAST * last + MASKED * masked, 0)
        self.schedule = [jnp.asarray(x, jnp.int32).reshape(-1) for x in (queries, keys, kind)]
        # A size of the grid that the device computes, where ends are traced.
        self.visits = self.most if xp is np else count.max()

    def at(self, b: Any, n: Any) -> Any:
        """Where a visit is in the schedule."""
        return n if self.rows == 1 else b * self.most + n

    def queries(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, width, self.tile[0]), lambda b, h, n, queries, *_: (b, h, 0, queries[self.at(b, n)])
        )

    def all_queries(self, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, width, self.shape[3]), lambda b, h, n, *_: (b, h, 0, 0))

    def keys(self, width: int, shared: bool = True) -> pl.BlockSpec:
        """Of the head that a group of those of queries shares, or of as many heads as there are of queries."""
        group = self.group if shared else 1
        return pl.BlockSpec(
            (None, None, width, self.tile[1]),
            lambda b, h, n, _, keys, __: (b, jax.lax.div(h, group), 0, keys[self.at(b, n)]),
        )

    def ends(self) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, 1, self.tile[0]),
            lambda b, h, n, queries, *_: (b if self.rows > 1 else 0, 0, queries[self.at(b, n)]),
        )

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        inputs: Sequence[tuple[pl.BlockSpec, jax.Array]],
        outputs: Sequence[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
        scratch: Sequence[Any] = (),
        *,
        products: int,
        interpret: bool,
    ) -> list[jax.Array]:
        """`kernel(kind, tile of queries, tile of keys, ends, *inputs, *outputs, *scratch)` for every visit."""

        def body(queries_ref, keys_ref, kind_ref, *refs):
            at = self.at(pl.program_id(0), pl.program_id(2))
            kernel(kind_ref[at], queries_ref[at], keys_ref[at], *refs)

        in_specs, arrays = zip((self.ends(), self.end_R1Q), *inputs, strict=True)
        out_specs, out_shape = zip(*outputs, strict=True)
        batch, heads, width, _ = self.shape
        scores = batch * heads * self.most * math.prod(self.tile)
        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.schedule),
                grid=(batch, heads, self.visits),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * width * scores,
                transcendentals=scores,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *out_shape)),
            ),
            interpret=pltpu.InterpretParams(detect_races=True) if interpret else False,
            name=name,
        )(*self.schedule, *arrays)


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Sums over these axes, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _parts(tile: int) -> list[slice]:
    part = PART if tile % PART == 0 else tile
    return [slice(at, at + part) for at in range(0, tile, part)]


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made before the last one is used: the compiler overlaps what is close in the program."""
    current = next(items)
    for following in items:
        yield current
        current = following
    yield current


def _on_visit(kind, visit: Callable[[bool], None]) -> None:
    """Runs `visit(masked)`: the mask is computed only where it hides something."""
    pl.when(kind & (LIVE | MASKED) == LIVE)(lambda: visit(False))
    pl.when(kind & MASKED != 0)(lambda: visit(True))


def _logits(part: slice, keys, masked: bool, end_ref, q_ref, k_ref, scale: float) -> jax.Array:
    """Scaled scores, to base 2, of a part of a tile of keys, (keys, queries)."""
    logits = _dot(k_ref[:, part], q_ref[...], (0, 0)) * (scale * LOG2_E)
    if masked:
        key = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        logits = jnp.where(key < end_ref[...] - (keys * k_ref.shape[1] + part.start), logits, UNSEEN)
    return logits


def _forward_kernel(
    kind, _, keys, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, most_ref, total_ref, sum_ref, *, scale: float
):
    """The largest logit of a query so far, and relative to it the sums of weights, (1, Q), and of values, (K, Q)."""

    @pl.when(kind & FIRST != 0)
    def start():
        most_ref[...] = jnp.full_like(most_ref, UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(masked: bool):
        parts = _parts(k_ref.shape[1])

        def weigh():
            most, total = most_ref[...], total_ref[...]
            for part, logits in _ahead((x, _logits(x, keys, masked, end_ref, q_ref, k_ref, scale)) for x in parts):
                before, most = most, jnp.maximum(most, logits.max(0, keepdims=True))
                weights, shrink = jnp.exp2(logits - most), jnp.exp2(before - most)
                total = total * shrink + weights.sum(0, keepdims=True)
                yield part, weights.astype(v_ref.dtype), shrink
            most_ref[...], total_ref[...] = most, total

        sums = sum_ref[...]
        for part, weights, shrink in _ahead(weigh()):
            sums = sums * shrink + _dot(v_ref[:, part], weights, (1, 0))
        sum_ref[...] = sums

    _on_visit(kind, visit)

    @pl.when(kind & LAST != 0)
    def finish():
        sees = end_ref[...] > 0
        total = jnp.where(sees, total_ref[...], 1.0)
        out_ref[...] = jnp.where(sees, sum_ref[...] / total, 0.0).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(sees, (most_ref[...] + jnp.log2(total)) / LOG2_E, jnp.inf)


def _backward_kernel(
    kind,
    queries,
    keys,
    end_ref,
    q_ref,
    k_ref,
    v_ref,
    dout_ref,
    lse_ref,
    delta_ref,
    *refs,
    scale: float,
    gradients: tuple[str, ...],
):
    """Sums of these gradients in float32, without the scale, for one tile of keys, (K, keys), and for all queries."""
    of = dict(zip(gradients, zip(refs[: len(gradients)], refs[len(gradients) :], strict=True), strict=True))

    if "dk" in of:
        (dk_ref, dk_sum_ref), (dv_ref, dv_sum_ref) = of["dk"], of["dv"]

        @pl.when(kind & FIRST != 0)
        def start():
            dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
            dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    def visit(masked: bool):
        def products():
            for part in _parts(k_ref.shape[1]):
                logits = _logits(part, keys, masked, end_ref, q_ref, k_ref, scale)
                yield part, logits, _dot(v_ref[:, part], dout_ref[...], (0, 0))

        dq = jnp.zeros(q_ref.shape, jnp.float32)
        for part, logits, dweights in _ahead(products()):
            weights = jnp.exp2(logits - lse_ref[...] * LOG2_E)
            dlogits = (weights * (dweights - delta_ref[...])).astype(q_ref.dtype)
            if "dk" in of:
                dv_sum_ref[:, part] += _dot(dout_ref[...], weights.astype(dout_ref.dtype), (1, 1))
                dk_sum_ref[:, part] += _dot(q_ref[...], dlogits, (1, 1))
            if "dq" in of:
                dq += _dot(k_ref[:, part], dlogits, (1, 0))
        if "dq" in of:
            dq_ref, dq_sum_ref = of["dq"]
            tile = q_ref.shape[1]
            own = pl.ds(pl.multiple_of(queries * tile, tile) if dq_ref.shape[1] > tile else 0, tile)
            # Every tile of queries visits the first tile of keys, and that one first.
            dq += jnp.where(keys == 0, 0.0, dq_sum_ref[:, own])
            dq_sum_ref[:, own] = dq
            dq_ref[:, own] = (scale * dq).astype(dq_ref.dtype)

    _on_visit(kind, visit)

    if "dk" in of:

        @pl.when(kind & LAST != 0)
        def finish():
            dk_ref[...] = (scale * dk_sum_ref[...]).astype(dk_ref.dtype)
            dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


KERNELS = Kernels(forward, backward)
