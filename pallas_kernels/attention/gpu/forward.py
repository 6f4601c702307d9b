"""The output and the log-sum-exp of tiles of queries."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.flash import Static
from pallas_kernels.attention.gpu.schedule import schedule
from pallas_kernels.attention.gpu.warpgroups import (
    LOG2E,
    MATRIX,
    ROWS,
    KernelShape,
    add_products,
    arrays,
    copy_tiles,
    full,
    kernel_of,
    kernel_shape,
    load,
    mask,
    overlap_matmuls,
    program_ids,
    registers,
    remainder,
    rows_of,
    transposed,
    warpgroup_rows,
)

# The running maximum before any key is seen. Finite, so that a row without keys gets weights of 0 instead of NaN.
LOWEST = -1e30


def softmax_step(scores: jax.Array, peak: jax.Array, total: jax.Array, scale: float) -> tuple[jax.Array, ...]:
    """Weights 2^(scale * scores - peak), the new peak and total of each row, and what earlier weights shrink by."""
    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
    shrink = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
    return weights, new_peak, total * shrink + weights.sum(axis=1), shrink


def _forward_body(
    sizes: KernelShape, q_ref, k_ref, v_ref, order, visited, whole, end, out_ref, lse_ref, buffers, barriers
):
    """One tile of queries of one head: `out` and `lse`."""
    q_smem, k_smem, v_smem, lse_smem = buffers
    q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
    warpgroups, rows = q_smem.shape[:2]
    stages, key_tile = k_smem.shape[:2]
    group, batch, head, lane = program_ids(order)

    def tile() -> Any:
        return order[lane, lax.axis_index("tile")]

    @pl.when(group == warpgroups)
    def copies() -> None:
        moves = [(k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)]
        copy_tiles(sizes, tile(), visited[lane, tile()], [(q_ref, q_smem)], q_ready, moves)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(registers(warpgroups)[0], action="increase")
        q = q_smem.at[group]
        steps, whole_steps = visited[lane, tile()], whole[lane, tile()]
        mine = warpgroup_rows(tile(), group, sizes.query_tile, rows)

        def weigh(step: Any, masked: bool, peak: jax.Array, total: jax.Array, scores: Callable[[], jax.Array]) -> Any:
            s = scores()
            plgpu.barrier_arrive(k_free.at[remainder(step, stages)])
            if masked:
                s = mask(s, load(end.at[lane, mine], ROWS), step * key_tile, 1)
            return softmax_step(s, peak, total, sizes.scale * LOG2E)

        def wait_turn() -> None:
            if warpgroups > 1:
                plgpu.barrier_wait(turn.at[group])

        def pass_turn() -> None:
            if warpgroups > 1:
                plgpu.barrier_arrive(turn.at[remainder(group + 1, warpgroups)])

        # Warpgroups take turns at starting products, so that the others are at their softmax meanwhile.
        pl.when(group == warpgroups - 1)(pass_turn)
        plgpu.barrier_wait(q_ready.at[group])
        plgpu.barrier_wait(k_ready.at[0])
        wait_turn()

        def first(scores: Callable[[], jax.Array]) -> Any:
            # 0, but not to a compiler: it would keep key indices in registers from here to the masked loop.
            step = jnp.minimum(steps - 1, 0)
            return weigh(step, True, full((rows,), LOWEST, ROWS), full((rows,), 0.0, ROWS), scores)[:3]

        new = [(q, transposed(k_smem.at[0]))]
        (weights, peak, total), _ = overlap_matmuls(sizes, new, [], first, issued=pass_turn)
        out = full((rows, sizes.width), 0.0, MATRIX)

        def visit(masked: bool, step: Any, carry: Any) -> Any:
            out, weights, peak, total = carry
            slot, last = remainder(step, stages), remainder(step - 1, stages)
            # A third warpgroup leaves no registers for the mask beside the operands of both products.
            overlap = not masked or warpgroups < 3
            operands = [k_ready.at[slot], v_ready.at[last]]
            first, second = operands if overlap else operands[::-1]
            plgpu.barrier_wait(first)
            wait_turn()
            (new_weights, peak, total, shrink), [out] = overlap_matmuls(
                sizes,
                [(q, transposed(k_smem.at[slot]))],
                [(out, weights, v_smem.at[last])],
                functools.partial(weigh, step, masked, peak, total),
                between=lambda: plgpu.barrier_wait(second),
                issued=pass_turn,
                overlap=overlap,
            )
            plgpu.barrier_arrive(v_free.at[last])
            return out * rows_of(shrink, out.shape), new_weights.astype(sizes.dtype), peak, total

        carry = (out, weights.astype(sizes.dtype), peak, total)
        split = jnp.maximum(whole_steps, 1)
        carry = lax.fori_loop(1, split, functools.partial(visit, False), carry)
        out, weights, peak, total = lax.fori_loop(split, steps, functools.partial(visit, True), carry)
        last = remainder(steps - 1, stages)
        plgpu.barrier_wait(v_ready.at[last])
        [out] = add_products(sizes, [(out, weights, v_smem.at[last])])
        if warpgroups > 1:
            pl.when(group == 0)(wait_turn)

        sees = total > 0
        out = out * rows_of(jnp.where(sees, 1 / total, 0.0), out.shape)
        q[...] = out.astype(sizes.dtype)
        lse = lse_smem.at[group]
        lse[...] = jnp.where(sees, peak * (1 / LOG2E) + jnp.log(total), jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, out_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(lse, lse_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def forward(q: jax.Array, k: jax.Array, v: jax.Array, end_RQ: Any, static: Static) -> tuple[jax.Array, jax.Array]:
    """Output, and the log-sum-exp (natural) of every query, float32."""
    sizes = kernel_shape(q, k, static.blocks.forward, static)
    plan = schedule(end_RQ, sizes.keys, sizes.query_tile, sizes.key_tile)
    warpgroups = sizes.warpgroups(sizes.query_tile)
    rows = sizes.query_tile // warpgroups
    stages = sizes.stages(2 * 2 * sizes.key_tile * sizes.width, 2 * sizes.query_tile * sizes.width)
    kernel = kernel_of(
        _forward_body,
        sizes,
        {"tile": sizes.queries // sizes.query_tile, "head": sizes.heads, "batch": sizes.batch},
        warpgroups,
        out=(jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        scratch=(
            (
                sizes.matrix(warpgroups, rows, sizes.width),
                sizes.matrix(stages, sizes.key_tile, sizes.width),
                sizes.matrix(stages, sizes.key_tile, sizes.width),
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
    return kernel(q, k, v, *arrays(plan.order_RT, plan.visited_RT, plan.whole_RT, plan.end_RQ))
