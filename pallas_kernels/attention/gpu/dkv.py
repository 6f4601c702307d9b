"""The gradients of keys and of values, tile by tile of keys."""

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
    COLUMNS,
    LOG2E,
    MATRIX,
    KernelShape,
    add_products,
    arrays,
    columns_of,
    full,
    kernel_of,
    kernel_shape,
    load,
    mask,
    overlap_matmuls,
    program_ids,
    registers,
    remainder,
    transposed,
    warpgroup_rows,
)


def _dkv_body(sizes: KernelShape, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, order, seen, clean, end, *rest):
    """One tile of keys of one head of keys: `dk` and `dv`, from all heads of queries that use it."""
    dk_ref, dv_ref, buffers, barriers = rest
    k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem = buffers
    k_ready, q_ready, dout_ready, q_free, dout_free = barriers
    warpgroups, rows = k_smem.shape[:2]
    stages, query_tile = q_smem.shape[:2]
    group, batch, head, lane = program_ids(order)
    tile = lax.axis_index("tile")

    def queries(step: Any) -> Any:
        return pl.ds(order[lane, step] * query_tile, query_tile)

    @pl.when(group == warpgroups)
    def copies() -> None:
        plgpu.set_max_registers(registers(warpgroups)[1], action="decrease")
        for of in range(warpgroups):
            for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch, head, warpgroup_rows(tile, of, sizes.key_tile, rows)], smem.at[of], k_ready.at[of]
                )
        steps = seen[lane, tile]

        def copy_head(member: Any, _: None) -> None:
            q_head = head * sizes.group + member

            def copy(step: Any, _: None) -> None:
                at = queries(step)
                count = member * steps + step
                slot = remainder(count, stages)
                for refs, smems, ready, free in (
                    ((q_ref, lse_ref), (q_smem, lse_smem), q_ready, q_free),
                    ((dout_ref, delta_ref), (dout_smem, delta_smem), dout_ready, dout_free),
                ):
                    pl.when(count >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                    for ref, smem in zip(refs, smems, strict=True):
                        plgpu.copy_gmem_to_smem(ref.at[batch, q_head, at], smem.at[slot], ready.at[slot])

            lax.fori_loop(0, steps, copy, None)

        lax.fori_loop(0, sizes.group, copy_head, None)

    @pl.when(group < warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(registers(warpgroups)[0], action="increase")
        k, v = k_smem.at[group], v_smem.at[group]
        steps = seen[lane, tile]
        mine = warpgroup_rows(tile, group, sizes.key_tile, rows)

        def weigh(step: Any, slot: Any, masked: bool, scores: Callable[[], jax.Array]) -> jax.Array:
            lse = load(lse_smem.at[slot], COLUMNS)
            s = scores()
            if masked:
                s = mask(s, load(end.at[lane, queries(step)], COLUMNS), mine.start, 0)
            return jnp.exp2(s * (sizes.scale * LOG2E) - columns_of(lse, s.shape))

        def differentiate(slot: Any, weights: jax.Array, dweights: Callable[[], jax.Array]) -> jax.Array:
            delta = load(delta_smem.at[slot], COLUMNS)
            return weights * (dweights() - columns_of(delta, weights.shape))

        def release(slot: Any) -> None:
            plgpu.barrier_arrive(dout_free.at[slot])
            plgpu.barrier_arrive(q_free.at[slot])

        def start_late(step: Any, count: Any, masked: bool, carried: list[Any]) -> Any:
            slot = remainder(count, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            plgpu.barrier_wait(dout_ready.at[slot])

            def work(scores: Callable[[], jax.Array], dweights: Callable[[], jax.Array]) -> Any:
                weights = weigh(step, slot, masked, scores)
                return weights, differentiate(slot, weights, dweights)

            new = [(k, transposed(q_smem.at[slot])), (v, transposed(dout_smem.at[slot]))]
            (weights, dscores), totals = overlap_matmuls(sizes, new, carried, work)
            return weights.astype(sizes.dtype), dscores.astype(sizes.dtype), totals

        def late_products(slot: Any, dk: jax.Array, dv: jax.Array, weights: jax.Array, dscores: jax.Array) -> list[Any]:
            return [(dv, weights, dout_smem.at[slot]), (dk, dscores, q_smem.at[slot])]

        def visit_late(member: Any, masked: bool, step: Any, carry: Any) -> Any:
            """Adds the products of the step before, while this one's weights are computed."""
            count = member * steps + step
            last = remainder(count - 1, stages)
            weights, dscores, [dv, dk] = start_late(step, count, masked, late_products(last, *carry))
            release(last)
            return dk, dv, weights, dscores

        def visit_now(member: Any, masked: bool, step: Any, carry: Any) -> Any:
            """One product after the other: fewer registers."""
            dk, dv = carry
            slot = remainder(member * steps + step, stages)
            plgpu.barrier_wait(q_ready.at[slot])
            new = [(k, transposed(q_smem.at[slot]))]
            weights, _ = overlap_matmuls(sizes, new, [], functools.partial(weigh, step, slot, masked))
            plgpu.barrier_wait(dout_ready.at[slot])
            [dv] = add_products(sizes, [(dv, weights.astype(sizes.dtype), dout_smem.at[slot])])
            new = [(v, transposed(dout_smem.at[slot]))]
            dscores, _ = overlap_matmuls(sizes, new, [], functools.partial(differentiate, slot, weights))
            [dk] = add_products(sizes, [(dk, dscores.astype(sizes.dtype), q_smem.at[slot])])
            release(slot)
            return dk, dv

        def visit_head(member: Any, carry: Any) -> Any:
            visit = functools.partial(visit_late if late else visit_now, member)
            begin = jnp.where(member == 0, 1, 0) if late else 0
            split = jnp.maximum(clean[lane, tile], begin)
            carry = lax.fori_loop(begin, split, functools.partial(visit, False), carry)
            return lax.fori_loop(split, steps, functools.partial(visit, True), carry)

        # Where 128 threads have registers for all operands and results at once.
        late = rows * (2 * sizes.width + 3 * query_tile) <= 128 * 180
        plgpu.barrier_wait(k_ready.at[group])
        carry: Any = (full((rows, sizes.width), 0.0, MATRIX), full((rows, sizes.width), 0.0, MATRIX))
        if late:
            carry = (*carry, *start_late(jnp.int32(0), jnp.int32(0), True, [])[:2])
        carry = lax.fori_loop(0, sizes.group, visit_head, carry)
        if late:
            dv, dk = add_products(sizes, late_products(remainder(sizes.group * steps - 1, stages), *carry))
        else:
            dk, dv = carry
        k[...] = (dk * sizes.scale).astype(sizes.dtype)
        v[...] = dv.astype(sizes.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k, dk_ref.at[batch, head, mine])
        plgpu.copy_smem_to_gmem(v, dv_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)


def dkv(args: tuple[jax.Array, ...], end_RQ: Any, static: Static) -> tuple[jax.Array, jax.Array]:
    """Of (q, k, v, dout, lse in base 2, delta)."""
    q, k, v, *_ = args
    sizes = kernel_shape(q, k, static.blocks.dkv, static)
    plan = schedule(end_RQ, sizes.keys, sizes.query_tile, sizes.key_tile)
    warpgroups = sizes.warpgroups(sizes.key_tile)
    rows = sizes.key_tile // warpgroups
    stages = sizes.stages(2 * sizes.query_tile * (2 * sizes.width + 4), 2 * 2 * sizes.key_tile * sizes.width)
    kernel = kernel_of(
        _dkv_body,
        sizes,
        {"tile": sizes.keys // sizes.key_tile, "head": k.shape[1], "batch": sizes.batch},
        warpgroups,
        out=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=(
            (
                sizes.matrix(warpgroups, rows, sizes.width),
                sizes.matrix(warpgroups, rows, sizes.width),
                sizes.matrix(stages, sizes.query_tile, sizes.width),
                sizes.matrix(stages, sizes.query_tile, sizes.width),
                plgpu.SMEM((stages, sizes.query_tile), jnp.float32),
                plgpu.SMEM((stages, sizes.query_tile), jnp.float32),
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
    return kernel(*args, *arrays(plan.order_RT, plan.seen_RS, plan.clean_RS, plan.end_RQ))
