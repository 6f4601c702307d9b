"""The gradient of queries, tile by tile."""

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


def _dq_body(sizes: KernelShape, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order, visited, whole, end, *rest):
    """One tile of queries of one head: `dq`."""
    dq_ref, buffers, barriers = rest
    q_smem, dout_smem, k_smem, v_smem = buffers
    q_ready, k_ready, v_ready, k_free, v_free = barriers
    warpgroups, rows = q_smem.shape[:2]
    stages, key_tile = k_smem.shape[:2]
    group, batch, head, lane = program_ids(order)

    def tile() -> Any:
        return order[lane, lax.axis_index("tile")]

    @pl.when(group == warpgroups)
    def copies() -> None:
        moves = [(k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)]
        copy_tiles(sizes, tile(), visited[lane, tile()], [(q_ref, q_smem), (dout_ref, dout_smem)], q_ready, moves)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(registers(warpgroups)[0], action="increase")
        q, dout = q_smem.at[group], dout_smem.at[group]
        steps, whole_steps = visited[lane, tile()], whole[lane, tile()]
        mine = warpgroup_rows(tile(), group, sizes.query_tile, rows)
        lse = load(lse_ref.at[batch, head, mine], ROWS)
        delta = load(delta_ref.at[batch, head, mine], ROWS)

        def differentiate(step: Any, masked: bool, scores: Callable[[], Any], dweights: Callable[[], Any]) -> Any:
            s = scores()
            if masked:
                s = mask(s, load(end.at[lane, mine], ROWS), step * key_tile, 1)
            weights = jnp.exp2(s * (sizes.scale * LOG2E) - rows_of(lse, s.shape))
            dw = dweights()
            plgpu.barrier_arrive(v_free.at[remainder(step, stages)])
            return weights * (dw - rows_of(delta, s.shape))

        def start(step: Any, masked: bool, carried: list[Any]) -> Any:
            slot = remainder(step, stages)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.barrier_wait(v_ready.at[slot])
            new = [(q, transposed(k_smem.at[slot])), (dout, transposed(v_smem.at[slot]))]
            return overlap_matmuls(sizes, new, carried, functools.partial(differentiate, step, masked))

        plgpu.barrier_wait(q_ready.at[group])
        dscores, _ = start(jnp.int32(0), True, [])
        dq = full((rows, sizes.width), 0.0, MATRIX)

        def visit(masked: bool, step: Any, carry: Any) -> Any:
            dq, dscores = carry
            last = remainder(step - 1, stages)
            new_dscores, [dq] = start(step, masked, [(dq, dscores, k_smem.at[last])])
            plgpu.barrier_arrive(k_free.at[last])
            return dq, new_dscores.astype(sizes.dtype)

        carry = (dq, dscores.astype(sizes.dtype))
        split = jnp.maximum(whole_steps, 1)
        carry = lax.fori_loop(1, split, functools.partial(visit, False), carry)
        dq, dscores = lax.fori_loop(split, steps, functools.partial(visit, True), carry)
        [dq] = add_products(sizes, [(dq, dscores, k_smem.at[remainder(steps - 1, stages)])])
        q[...] = (dq * sizes.scale).astype(sizes.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, dq_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def dq(args: tuple[jax.Array, ...], end_RQ: Any, static: Static) -> jax.Array:
    """Of (q, k, v, dout, lse in base 2, delta)."""
    q, k, *_ = args
    sizes = kernel_shape(q, k, static.blocks.dq, static)
    plan = schedule(end_RQ, sizes.keys, sizes.query_tile, sizes.key_tile)
    warpgroups = sizes.warpgroups(sizes.query_tile)
    rows = sizes.query_tile // warpgroups
    stages = sizes.stages(2 * 2 * sizes.key_tile * sizes.width, 2 * 2 * sizes.query_tile * sizes.width)
    kernel = kernel_of(
        _dq_body,
        sizes,
        {"tile": sizes.queries // sizes.query_tile, "head": sizes.heads, "batch": sizes.batch},
        warpgroups,
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch=(
            (
                sizes.matrix(warpgroups, rows, sizes.width),
                sizes.matrix(warpgroups, rows, sizes.width),
                sizes.matrix(stages, sizes.key_tile, sizes.width),
                sizes.matrix(stages, sizes.key_tile, sizes.width),
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
    return kernel(*args, *arrays(plan.order_RT, plan.visited_RT, plan.whole_RT, plan.end_RQ))
