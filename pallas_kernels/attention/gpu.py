"""Attention by tiles on Hopper (sm90): Pallas Mosaic GPU kernels for the output, for dQ, and for dK and dV.

A program is two compute warpgroups (three where a tile of queries is a multiple of 192, one where it is 64) and one
that copies tiles from global memory ahead of them, after FlashAttention-3 (Shah et al. 2024). A warpgroup owns
tile / warpgroups rows of the scores: queries in the forward pass and in dQ, keys in dK and dV, where scores are
transposed, so that what goes into the second product is in registers each time. While the tensor cores multiply the
weights of one tile, the warpgroup works on the scores of the next.

Tiles past a tile's key end are in no loop; masks are in the loops over boundary tiles only.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.flash import Kernels, Static
from pallas_kernels.attention.tiles import tiles_of

LOG2E = math.log2(math.e)
# The running maximum before any key is seen. Finite, so that a row without keys gets weights of 0 instead of NaN.
LOWEST = -1e30
# What tiles may use of an SM's 227 KiB of shared memory; the rest is for row sums, reductions and barriers.
SHARED_BYTES = 220 * 1024

MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# JAX 0.10 wants an index of what it loads.
_EVERYTHING: Any = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


class Schedule(NamedTuple):
    """Int32 arrays for T tiles of queries and S of keys; R is 1 or the batch.

    `order_RT` are tiles of queries, those with most work first. Each visits the first `visited_RT` tiles of keys, the
    first `whole_RT` of them without a mask. A tile of keys is visited by the first `seen_RS` of `order_RT`, of which
    the first `clean_RS` need no mask.
    """

    order_RT: Any
    visited_RT: Any
    whole_RT: Any
    seen_RS: Any
    clean_RS: Any
    end_RQ: Any


def schedule(end_RQ: Any, keys: int, query_tile: int, key_tile: int) -> Schedule:
    """The tiles that kernels visit; see `tiles.tiles_of`."""
    xp: Any = np if isinstance(end_RQ, np.ndarray) else jnp
    tiles = tiles_of(end_RQ, keys, query_tile, key_tile)
    # Among tiles that visit as many keys, one with two ends goes last: the mask that it needs is then not in the way.
    work = tiles.visited_RT * (keys // key_tile + 1) + tiles.whole_RT
    order = xp.argsort(-work, axis=-1, **({"kind": "stable"} if xp is np else {"stable": True}))
    whole = xp.take_along_axis(tiles.whole_RT, order, axis=1)
    whole = np.minimum.accumulate(whole, axis=1) if xp is np else lax.cummin(whole, axis=1)
    clean = (whole[:, None] > xp.arange(keys // key_tile)[:, None]).sum(-1)
    parts = (order, tiles.visited_RT, tiles.whole_RT, tiles.seen_RS, clean, end_RQ)
    return Schedule(*(part.astype(np.int32) for part in parts))


def mask(scores: jax.Array, end: jax.Array, first_key: jax.Array, key_axis: int) -> jax.Array:
    """Scores of keys from `first_key` on; minus infinity from the end of each query's keys."""
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, key_axis, layout=MATRIX) + first_key
    return jnp.where(key < lax.broadcast_in_dim(end, scores.shape, [1 - key_axis]), scores, -jnp.inf)


def softmax_step(scores: jax.Array, peak: jax.Array, total: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Weights 2^(scale * scores - peak), the new peak and total of each row, and what earlier weights shrink by."""
    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
    shrink = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
    return weights, new_peak, total * shrink + weights.sum(axis=1), shrink


@dataclasses.dataclass(frozen=True)
class Form:
    """Sizes that a kernel is made for."""

    batch: int
    heads: int
    group: int
    queries: int
    keys: int
    width: int
    query_tile: int
    key_tile: int
    dtype: Any
    scale: float
    interpret: bool

    @property
    def swizzle(self) -> int:
        return math.gcd(2 * self.width, 128)

    def warpgroups(self, tile: int) -> int:
        return 3 if tile % 192 == 0 else 2 if tile % 128 == 0 else 1

    def matrix(self, *shape: int) -> Any:
        """Shared memory for matrices that are operands of products."""
        tiling: Any = plgpu.TilingTransform
        swizzle: Any = plgpu.SwizzleTransform
        transforms = (tiling((8, self.swizzle // 2)), swizzle(self.swizzle))
        return plgpu.SMEM(shape, self.dtype, transforms=transforms)

    def stages(self, each: int, fixed: int) -> int:
        """How many tiles of `each` bytes fit beside `fixed` bytes, 2 to 4: one is used while the next arrives."""
        return max(2, min(4, (SHARED_BYTES - fixed) // each))


def _registers(warpgroups: int) -> tuple[int, int]:
    """Of a thread that computes, and of one that copies; an SM has 65,536."""
    return (160, 32) if warpgroups == 3 else (240, 24)


def _kernel(
    body: Callable[..., None], form: Form, grid: dict[str, int], warpgroups: int, out: Any, scratch: Any
) -> Any:
    interpret: Any = {}
    if form.interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise NotImplementedError(f"JAX {jax.__version__} has no interpret mode for GPU kernels; JAX 0.12 has")
        interpret = {"interpret": plgpu.InterpretGPUParams()}
    return plgpu.kernel(
        functools.partial(body, form),
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name=f"attention{body.__name__.removesuffix('_body')}",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        **interpret,
    )


def _together(
    form: Form,
    new: list[tuple[Any, Any]],
    carried: list[tuple[jax.Array, Any, Any]],
    work: Callable[..., Any],
    between: Callable[[], None] = lambda: None,
    issued: Callable[[], None] = lambda: None,
    overlap: bool = True,
) -> tuple[Any, list[jax.Array]]:
    """Starts the products a b of `new`, and after them total + a b of `carried`, which run while `work` does.

    `work` gets a function for each of `new` that waits for it. `between` is called before `carried` start, `issued`
    when all have. Without `overlap`, `carried` are done before `new` start, which takes fewer registers. Returns the
    result of `work`, and the new totals.
    """
    if not overlap:
        totals = _add_products(form, carried)
        between()
        return _together(form, new, [], work, issued=issued)[0], totals
    if form.interpret:
        # It takes neither operands nor totals that are in registers.
        def dot(a: Any, b: Any) -> jax.Array:
            return jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))

        products = [dot(a, b) for a, b in new]
        between()
        totals = [total + dot(a, b) for total, a, b in carried]
        issued()
        # Products read shared memory in the order of asynchronous copies, these loads do not.
        plgpu.commit_smem()
        return work(*(functools.partial(lambda x: x, product) for product in products)), totals

    def run(new_refs: list[Any], carried_refs: list[Any]) -> Any:
        for ref, (total, _, _) in zip(carried_refs, carried, strict=True):
            ref[...] = total
        for ref, (a, b) in zip(new_refs, new, strict=True):
            plgpu.wgmma(ref, a, b)
        between()
        for ref, (_, a, b) in zip(carried_refs, carried, strict=True):
            plgpu.wgmma(ref, a, b)
        issued()
        behind = reversed(range(len(carried), len(new) + len(carried)))
        load = plgpu.wgmma_accumulator_load
        waits = [functools.partial(load, ref, wait_n=n) for ref, n in zip(new_refs, behind, strict=True)]
        return work(*waits), [ref[...] for ref in carried_refs]

    def accumulator(a: Any, b: Any) -> Any:
        return plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32)

    return pl.run_scoped(run, [accumulator(a, b) for a, b in new], [accumulator(a, b) for _, a, b in carried])


def _add_products(form: Form, carried: list[tuple[jax.Array, Any, Any]]) -> list[jax.Array]:
    """total + a b for each."""
    return _together(form, [], carried, lambda: ())[1]


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0))


def _rem(step: Any, stages: int) -> Any:
    return lax.rem(step, jnp.int32(stages))


def _load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=False)


def _full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _rows(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, [0])


def _columns(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, [1])


def _part(tile: Any, group: Any, size: int, rows: int) -> Any:
    """The rows of a tile that are a warpgroup's."""
    return pl.ds(tile * size + group * rows, rows)


def _place(order: Any) -> tuple[Any, Any, Any, Any]:
    """Warpgroup, batch, head, and the row of the schedule, of which all of the batch may share one."""
    group, batch, head = lax.axis_index("warpgroup"), lax.axis_index("batch"), lax.axis_index("head")
    return group, batch, head, batch if order.shape[0] > 1 else 0


def _copy_tiles(form: Form, tile: Any, steps: Any, once: list[Any], once_ready: Any, moves: list[Any]) -> None:
    """What the copying warpgroup does for a tile of queries: (global, shared) `once`, and `moves` for each step.

    `moves` are (global, shared, barrier when it is there, barrier when it may be overwritten).
    """
    warpgroups, rows = once[0][1].shape[:2]
    stages = moves[0][1].shape[0]
    plgpu.set_max_registers(_registers(warpgroups)[1], action="decrease")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    for of in range(warpgroups):
        for ref, smem in once:
            mine = _part(tile, of, form.query_tile, rows)
            plgpu.copy_gmem_to_smem(ref.at[batch, head, mine], smem.at[of], once_ready.at[of])

    def copy(step: Any, _: None) -> None:
        slot = _rem(step, stages)
        for ref, smem, ready, free in moves:
            pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            keys = ref.at[batch, lax.div(head, jnp.int32(form.group)), pl.ds(step * form.key_tile, form.key_tile)]
            plgpu.copy_gmem_to_smem(keys, smem.at[slot], ready.at[slot])

    lax.fori_loop(0, steps, copy, None)


def _forward_body(form: Form, q_ref, k_ref, v_ref, order, visited, whole, end, out_ref, lse_ref, buffers, barriers):
    """One tile of queries of one head: `out` and `lse`."""
    q_smem, k_smem, v_smem, lse_smem = buffers
    q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
    warpgroups, rows = q_smem.shape[:2]
    stages, key_tile = k_smem.shape[:2]
    group, batch, head, lane = _place(order)

    def tile() -> Any:
        return order[lane, lax.axis_index("tile")]

    @pl.when(group == warpgroups)
    def copies() -> None:
        moves = [(k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)]
        _copy_tiles(form, tile(), visited[lane, tile()], [(q_ref, q_smem)], q_ready, moves)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(_registers(warpgroups)[0], action="increase")
        q = q_smem.at[group]
        steps, whole_steps = visited[lane, tile()], whole[lane, tile()]
        mine = _part(tile(), group, form.query_tile, rows)

        def weigh(step: Any, masked: bool, peak: jax.Array, total: jax.Array, scores: Callable[[], jax.Array]) -> Any:
            s = scores()
            plgpu.barrier_arrive(k_free.at[_rem(step, stages)])
            if masked:
                s = mask(s, _load(end.at[lane, mine], ROWS), step * key_tile, 1)
            return softmax_step(s, peak, total, form.scale * LOG2E)

        def wait_turn() -> None:
            if warpgroups > 1:
                plgpu.barrier_wait(turn.at[group])

        def pass_turn() -> None:
            if warpgroups > 1:
                plgpu.barrier_arrive(turn.at[_rem(group + 1, warpgroups)])

        # Warpgroups take turns at starting products, so that the others are at their softmax meanwhile.
        pl.when(group == warpgroups - 1)(pass_turn)
        plgpu.barrier_wait(q_ready.at[group])
        plgpu.barrier_wait(k_ready.at[0])
        wait_turn()

        def first(scores: Callable[[], jax.Array]) -> Any:
            # 0, but not to a compiler: it would keep key indices in registers from here to the masked loop.
            step = jnp.minimum(steps - 1, 0)
            return weigh(step, True, _full((rows,), LOWEST, ROWS), _full((rows,), 0.0, ROWS), scores)[:3]

        new = [(q, _transposed(k_smem.at[0]))]
        (weights, peak, total), _ = _together(form, new, [], first, issued=pass_turn)
        out = _full((rows, form.width), 0.0, MATRIX)

        def visit(masked: bool, step: Any, carry: Any) -> Any:
            out, weights, peak, total = carry
            slot, last = _rem(step, stages), _rem(step - 1, stages)
            # A third warpgroup leaves no registers for the mask beside the operands of both products.
            overlap = not masked or warpgroups < 3
            operands = [k_ready.at[slot], v_ready.at[last]]
            first, second = operands if overlap else operands[::-1]
            plgpu.barrier_wait(first)
            wait_turn()
            (new_weights, peak, total, shrink), [out] = _together(
                form,
                [(q, _transposed(k_smem.at[slot]))],
                [(out, weights, v_smem.at[last])],
                functools.partial(weigh, step, masked, peak, total),
                between=lambda: plgpu.barrier_wait(second),
                issued=pass_turn,
                overlap=overlap,
            )
            plgpu.barrier_arrive(v_free.at[last])
            return out * _rows(shrink, out.shape), new_weights.astype(form.dtype), peak, total

        carry = (out, weights.astype(form.dtype), peak, total)
        split = jnp.maximum(whole_steps, 1)
        carry = lax.fori_loop(1, split, functools.partial(visit, False), carry)
        out, weights, peak, total = lax.fori_loop(split, steps, functools.partial(visit, True), carry)
        last = _rem(steps - 1, stages)
        plgpu.barrier_wait(v_ready.at[last])
        [out] = _add_products(form, [(out, weights, v_smem.at[last])])
        if warpgroups > 1:
            pl.when(group == 0)(wait_turn)

        sees = total > 0
        out = out * _rows(jnp.where(sees, 1 / total, 0.0), out.shape)
        q[...] = out.astype(form.dtype)
        lse = lse_smem.at[group]
        lse[...] = jnp.where(sees, peak * (1 / LOG2E) + jnp.log(total), jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def _dq_body(form: Form, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order, visited, whole, end, *rest):
    """One tile of queries of one head: `dq`."""
    dq_ref, buffers, barriers = rest
    q_smem, dout_smem, k_smem, v_smem = buffers
    q_ready, k_ready, v_ready, k_free, v_free = barriers
    warpgroups, rows = q_smem.shape[:2]
    stages, key_tile = k_smem.shape[:2]
    group, batch, head, lane = _place(order)

    def tile() -> Any:
        return order[lane, lax.axis_index("tile")]

    @pl.when(group == warpgroups)
    def copies() -> None:
        moves = [(k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)]
        _copy_tiles(form, tile(), visited[lane, tile()], [(q_ref, q_smem), (dout_ref, dout_smem)], q_ready, moves)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(_registers(warpgroups)[0], action="increase")
        q, dout = q_smem.at[group], dout_smem.at[group]
        steps, whole_steps = visited[lane, tile()], whole[lane, tile()]
        mine = _part(tile(), group, form.query_tile, rows)
        lse = _load(lse_ref.at[batch, head, mine], ROWS)
        delta = _load(delta_ref.at[batch, head, mine], ROWS)

        def differentiate(step: Any, masked: bool, scores: Callable[[], Any], dweights: Callable[[], Any]) -> Any:
            s = scores()
            if masked:
                s = mask(s, _load(end.at[lane, mine], ROWS), step * key_tile, 1)
            weights = jnp.exp2(s * (form.scale * LOG2E) - _rows(lse, s.shape))
            dw = dweights()
            plgpu.barrier_arrive(v_free.at[_rem(step, stages)])
            return weights * (dw - _rows(delta, s.shape))

        def start(step: Any, masked: bool, carried: list[Any]) -> Any:
            slot = _rem(step, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])
            new = [(q, _transposed(k_smem.at[slot])), (dout, _transposed(v_smem.at[slot]))]
            return _together(form, new, carried, functools.partial(differentiate, step, masked))

        plgpu.barrier_wait(q_ready.at[group])
        dscores, _ = start(jnp.int32(0), True, [])
        dq = _full((rows, form.width), 0.0, MATRIX)

        def visit(masked: bool, step: Any, carry: Any) -> Any:
            dq, dscores = carry
            last = _rem(step - 1, stages)
            new_dscores, [dq] = start(step, masked, [(dq, dscores, k_smem.at[last])])
            plgpu.barrier_arrive(k_free.at[last])
            return dq, new_dscores.astype(form.dtype)

        carry = (dq, dscores.astype(form.dtype))
        split = jnp.maximum(whole_steps, 1)
        carry = lax.fori_loop(1, split, functools.partial(visit, False), carry)
        dq, dscores = lax.fori_loop(split, steps, functools.partial(visit, True), carry)
        [dq] = _add_products(form, [(dq, dscores, k_smem.at[_rem(steps - 1, stages)])])
        q[...] = (dq * form.scale).astype(form.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def _dkv_body(form: Form, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order, seen, clean, end, *rest):
    """One tile of keys of one head of keys: `dk` and `dv`, from all heads of queries that use it."""
    dk_ref, dv_ref, buffers, barriers = rest
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = buffers
    k_ready, q_ready, dout_ready, q_free, dout_free = barriers
    warpgroups, rows = k_smem.shape[:2]
    stages, query_tile = q_smem.shape[:2]
    group, batch, head, lane = _place(order)
    tile = lax.axis_index("tile")

    def queries(step: Any) -> Any:
        return pl.ds(order[lane, step] * query_tile, query_tile)

    @pl.when(group == warpgroups)
    def copies() -> None:
        plgpu.set_max_registers(_registers(warpgroups)[1], action="decrease")
        for of in range(warpgroups):
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch, head, _part(tile, of, form.key_tile, rows)], smem.at[of], k_ready.at[of]
                )
        steps = seen[lane, tile]

        def copy_head(member: Any, _: None) -> None:
            q_head = head * form.group + member

            def copy(step: Any, _: None) -> None:
                at = queries(step)
                count = member * steps + step
                slot = _rem(count, stages)
                for refs, smems, ready, free in (
                    ((q_ref, lse_ref), (q_smem, lse_smem), q_ready, q_free),
                    ((dout_ref, delta_ref), (dout_smem, delta_smem), dout_ready, dout_free),
                ):
                    pl.when(count >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    for ref, smem in zip(refs, smems, strict=True):
                        plgpu.copy_gmem_to_smem(ref.at[batch, q_head, at], smem.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, copy, None)

        lax.fori_loop(0, form.group, copy_head, None)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(_registers(warpgroups)[0], action="increase")
        k, v = k_smem.at[group], v_smem.at[group]
        steps = seen[lane, tile]
        mine = _part(tile, group, form.key_tile, rows)

        def weigh(step: Any, slot: Any, masked: bool, scores: Callable[[], jax.Array]) -> jax.Array:
            lse = _load(lse_smem.at[slot], COLUMNS)
            s = scores()
            if masked:
                s = mask(s, _load(end.at[lane, queries(step)], COLUMNS), mine.start, 0)
            return jnp.exp2(s * (form.scale * LOG2E) - _columns(lse, s.shape))

        def differentiate(slot: Any, weights: jax.Array, dweights: Callable[[], jax.Array]) -> jax.Array:
            delta = _load(delta_smem.at[slot], COLUMNS)
            return weights * (dweights() - _columns(delta, weights.shape))

        def release(slot: Any) -> None:
            plgpu.barrier_arrive(dout_free.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])

        def start_late(step: Any, count: Any, masked: bool, carried: list[Any]) -> Any:
            slot = _rem(count, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            plgpu.barrier_wait(dout_ready.at[slot])

            def work(scores: Callable[[], jax.Array], dweights: Callable[[], jax.Array]) -> Any:
                weights = weigh(step, slot, masked, scores)
                return weights, differentiate(slot, weights, dweights)

            new = [(k, _transposed(q_smem.at[slot])), (v, _transposed(dout_smem.at[slot]))]
            (weights, dscores), totals = _together(form, new, carried, work)
            return weights.astype(form.dtype), dscores.astype(form.dtype), totals

        def late_products(slot: Any, dk: jax.Array, dv: jax.Array, weights: jax.Array, dscores: jax.Array) -> list[Any]:
            return [(dv, weights, dout_smem.at[slot]), (dk, dscores, q_smem.at[slot])]

        def visit_late(member: Any, masked: bool, step: Any, carry: Any) -> Any:
            """Adds the products of the step before, while this one's weights are computed."""
            count = member * steps + step
            last = _rem(count - 1, stages)
            weights, dscores, [dv, dk] = start_late(step, count, masked, late_products(last, *carry))
            release(last)
            return dk, dv, weights, dscores

        def visit_now(member: Any, masked: bool, step: Any, carry: Any) -> Any:
            """One product after the other: fewer registers."""
            dk, dv = carry
            slot = _rem(member * steps + step, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            new = [(k, _transposed(q_smem.at[slot]))]
            weights, _ = _together(form, new, [], functools.partial(weigh, step, slot, masked))
            plgpu.barrier_wait(dout_ready.at[slot])
            [dv] = _add_products(form, [(dv, weights.astype(form.dtype), dout_smem.at[slot])])
            new = [(v, _transposed(dout_smem.at[slot]))]
            dscores, _ = _together(form, new, [], functools.partial(differentiate, slot, weights))
            [dk] = _add_products(form, [(dk, dscores.astype(form.dtype), q_smem.at[slot])])
            release(slot)
            return dk, dv

        def visit_head(member: Any, carry: Any) -> Any:
            visit = functools.partial(visit_late if late else visit_now, member)
            begin = jnp.where(member == 0, 1, 0) if late else 0
            split = jnp.maximum(clean[lane, tile], begin)
            carry = lax.fori_loop(begin, split, functools.partial(visit, False), carry)
            return lax.fori_loop(split, steps, functools.partial(visit, True), carry)

        # Where 128 threads have registers for all operands and results at once.
        late = rows * (2 * form.width + 3 * query_tile) <= 128 * 180
        plgpu.barrier_wait(k_ready.at[group])
        carry: Any = (_full((rows, form.width), 0.0, MATRIX), _full((rows, form.width), 0.0, MATRIX))
        if late:
            carry = (*carry, *start_late(jnp.int32(0), jnp.int32(0), True, [])[:2])
        carry = lax.fori_loop(0, form.group, visit_head, carry)
        if late:
            dv, dk = _add_products(form, late_products(_rem(form.group * steps - 1, stages), *carry))
        else:
            dk, dv = carry
        k[...] = (dk * form.scale).astype(form.dtype)
        v[...] = dv.astype(form.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def _form(q: jax.Array, k: jax.Array, block: tuple[int, int], static: Static) -> Form:
    batch, heads, queries, width = q.shape
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"GPU attention kernels take bfloat16 or float16, not {q.dtype}")
    if static.scale <= 0:
        raise NotImplementedError(f"GPU attention kernels need a scale above 0, not {static.scale}")
    if width > 128:
        raise NotImplementedError(f"GPU attention kernels take heads of up to 128, not {width}")
    if block[0] % 64 or block[1] % 64:
        raise NotImplementedError(f"GPU attention kernels need tiles of multiples of 64, not {block}")
    group, keys = heads // k.shape[1], k.shape[2]
    return Form(batch, heads, group, queries, keys, width, *block, q.dtype, static.scale, static.interpret)


def _widened(*arrays: jax.Array) -> list[jax.Array]:
    """With zeros up to a multiple of 16 in the last axis, which is what products take."""
    missing = -arrays[0].shape[-1] % 16
    return [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else x for x in arrays]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, end_RQ: Any, static: Static) -> tuple[jax.Array, jax.Array]:
    width = q.shape[-1]
    q, k, v = _widened(q, k, v)
    form = _form(q, k, static.blocks.forward, static)
    plan = schedule(end_RQ, form.keys, form.query_tile, form.key_tile)
    warpgroups = form.warpgroups(form.query_tile)
    rows = form.query_tile // warpgroups
    stages = form.stages(2 * 2 * form.key_tile * form.width, 2 * form.query_tile * form.width)
    kernel = _kernel(
        _forward_body,
        form,
        {"tile": form.queries // form.query_tile, "head": form.heads, "batch": form.batch},
        warpgroups,
        out=(jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        scratch=(
            (
                form.matrix(warpgroups, rows, form.width),
                form.matrix(stages, form.key_tile, form.width),
                form.matrix(stages, form.key_tile, form.width),
                plgpu.SMEM((warpgroups, rows), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=warpgroups),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_barriers=warpgroups),
            ),
        ),
    )
    out, lse = kernel(q, k, v, *_arrays(plan.order_RT, plan.visited_RT, plan.whole_RT, plan.end_RQ))
    return out[..., :width], lse


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    dout: jax.Array,
    end_RQ: Any,
    static: Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    width = q.shape[-1]
    q, k, v, dout = _widened(q, k, v, dout)
    args = q, k, v, dout, lse * LOG2E, delta
    grads = _dq(args, end_RQ, static), *_dkv(args, end_RQ, static)
    dq, dk, dv = (x[..., :width] for x in grads)
    return dq, dk, dv


def _dq(args: tuple[jax.Array, ...], end_RQ: Any, static: Static) -> jax.Array:
    q, k, *_ = args
    form = _form(q, k, static.blocks.dq, static)
    plan = schedule(end_RQ, form.keys, form.query_tile, form.key_tile)
    warpgroups = form.warpgroups(form.query_tile)
    rows = form.query_tile // warpgroups
    stages = form.stages(2 * 2 * form.key_tile * form.width, 2 * 2 * form.query_tile * form.width)
    kernel = _kernel(
        _dq_body,
        form,
        {"tile": form.queries // form.query_tile, "head": form.heads, "batch": form.batch},
        warpgroups,
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=(
            (
                form.matrix(warpgroups, rows, form.width),
                form.matrix(warpgroups, rows, form.width),
                form.matrix(stages, form.key_tile, form.width),
                form.matrix(stages, form.key_tile, form.width),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            ),
        ),
    )
    return kernel(*args, *_arrays(plan.order_RT, plan.visited_RT, plan.whole_RT, plan.end_RQ))


def _dkv(args: tuple[jax.Array, ...], end_RQ: Any, static: Static) -> tuple[jax.Array, jax.Array]:
    q, k, v, *_ = args
    form = _form(q, k, static.blocks.dkv, static)
    plan = schedule(end_RQ, form.keys, form.query_tile, form.key_tile)
    warpgroups = form.warpgroups(form.key_tile)
    rows = form.key_tile // warpgroups
    stages = form.stages(2 * form.query_tile * (2 * form.width + 4), 2 * 2 * form.key_tile * form.width)
    kernel = _kernel(
        _dkv_body,
        form,
        {"tile": form.keys // form.key_tile, "head": k.shape[1], "batch": form.batch},
        warpgroups,
        out=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=(
            (
                form.matrix(warpgroups, rows, form.width),
                form.matrix(warpgroups, rows, form.width),
                form.matrix(stages, form.query_tile, form.width),
                form.matrix(stages, form.query_tile, form.width),
                plgpu.SMEM((stages, form.query_tile), jnp.float32),
                plgpu.SMEM((stages, form.query_tile), jnp.float32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
                plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            ),
        ),
    )
    return kernel(*args, *_arrays(plan.order_RT, plan.seen_RS, plan.clean_RS, plan.end_RQ))


def _arrays(*parts: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(part) for part in parts)


KERNELS = Kernels(_forward, _backward)
