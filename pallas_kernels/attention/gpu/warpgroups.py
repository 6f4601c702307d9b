"""What the three kernels are made of: their sizes, products that run while something else does, copies, masks."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.flash import Static

LOG2E = math.log2(math.e)
# What tiles may use of an SM's 227 KiB of shared memory; the rest is for row sums, reductions and barriers.
SHARED_BYTES = 220 * 1024

MATRIX = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
# JAX 0.10 wants an index of what it loads.
_EVERYTHING: Any = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


@dataclasses.dataclass(frozen=True)
class KernelShape:
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


def kernel_shape(q: jax.Array, k: jax.Array, block: tuple[int, int], static: Static) -> KernelShape:
    """The sizes of a call; `NotImplementedError` for what the kernels do not take."""
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
    return KernelShape(batch, heads, group, queries, keys, width, *block, q.dtype, static.scale, static.interpret)


def registers(warpgroups: int) -> tuple[int, int]:
    """Of a thread that computes, and of one that copies; an SM has 65,536."""
    return (160, 32) if warpgroups == 3 else (240, 24)


def kernel_of(
    body: Callable[..., None], sizes: KernelShape, grid: dict[str, int], warpgroups: int, out: Any, scratch: Any
) -> Any:
    interpret: Any = {}
    if sizes.interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise NotImplementedError(f"JAX {jax.__version__} has no interpret mode for GPU kernels; JAX 0.12 has")
        interpret = {"interpret": plgpu.InterpretGPUParams()}
    return plgpu.kernel(
        functools.partial(body, sizes),
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


def overlap_matmuls(
    sizes: KernelShape,
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
        totals = add_products(sizes, carried)
        between()
        return overlap_matmuls(sizes, new, [], work, issued=issued)[0], totals
    if sizes.interpret:
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


def add_products(sizes: KernelShape, carried: list[tuple[jax.Array, Any, Any]]) -> list[jax.Array]:
    """total + a b for each."""
    return overlap_matmuls(sizes, [], carried, lambda: ())[1]


def transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0))


def remainder(step: Any, stages: int) -> Any:
    return lax.rem(step, jnp.int32(stages))


def load(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def rows_of(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, [0])


def columns_of(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(values, shape, [1])


def warpgroup_rows(tile: Any, group: Any, size: int, rows: int) -> Any:
    """The rows of a tile that are a warpgroup's."""
    return pl.ds(tile * size + group * rows, rows)


def program_ids(order: Any) -> tuple[Any, Any, Any, Any]:
    """Warpgroup, batch, head, and the row of the schedule, of which all of the batch may share one."""
    group, batch, head = lax.axis_index("warpgroup"), lax.axis_index("batch"), lax.axis_index("head")
    return group, batch, head, batch if order.shape[0] > 1 else 0


def copy_tiles(sizes: KernelShape, tile: Any, steps: Any, once: list[Any], once_ready: Any, moves: list[Any]) -> None:
    """What the copying warpgroup does for a tile of queries: (global, shared) `once`, and `moves` for each step.

    `moves` are (global, shared, barrier when it is there, barrier when it may be overwritten).
    """
    warpgroups, rows = once[0][1].shape[:2]
    stages = moves[0][1].shape[0]
    plgpu.set_max_registers(registers(warpgroups)[1], action="decrease")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    for of in range(warpgroups):
        for ref, smem in once:
            mine = warpgroup_rows(tile, of, sizes.query_tile, rows)
            plgpu.copy_gmem_to_smem(ref.at[batch, head, mine], smem.at[of], once_ready.at[of])

    def copy(step: Any, _: None) -> None:
        slot = remainder(step, stages)
        for ref, smem, ready, free in moves:
            pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            keys = ref.at[batch, lax.div(head, jnp.int32(sizes.group)), pl.ds(step * sizes.key_tile, sizes.key_tile)]
            plgpu.copy_gmem_to_smem(keys, smem.at[slot], ready.at[slot])

    lax.fori_loop(0, steps, copy, None)


def mask(scores: jax.Array, end: jax.Array, first_key: jax.Array, key_axis: int) -> jax.Array:
    """Scores of keys from `first_key` on; minus infinity from the end of each query's keys."""
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, key_axis, layout=MATRIX) + first_key
    return jnp.where(key < lax.broadcast_in_dim(end, scores.shape, [1 - key_axis]), scores, -jnp.inf)


def arrays(*parts: Any) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(warpgroup_rows) for warpgroup_rows in parts)
