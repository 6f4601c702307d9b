"""How fast attention is: `python benchmarks/attention.py` for this device, `--torch` beside PyTorch, `--tiles` counts.

Prints, for every implementation that the device has and every shape of HART, the time of a forward pass and of forward
and backward together, useful TFLOP/s (4 and 14 FLOPs per channel for each pair of query and key that see each other:
what is masked does not count) and the share of the device's peak; on a CPU that is a matrix product's rate in the same
run. All implementations alternate, and times are medians. Gradients are those of q, k and v.
"""

import argparse
import datetime
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import ATTENTION
from hart_jax.errors import UserError, run_cli
from hart_jax.nn.flop_counter import peak_flops
from pallas_kernels.attention import attention, tokamax
from pallas_kernels.attention.conformance import Case, errors, gradients
from pallas_kernels.attention.mask import Layout, row_ends
from pallas_kernels.attention.measured import TABLE_FILE, Row, write_rows
from pallas_kernels.attention.shapes import SHAPES, Shape
from pallas_kernels.attention.tiles import by_keys, by_queries, tiles_of

IMPLEMENTATIONS = {
    "cpu": ("xla",),
    "gpu": ("xla", "cudnn", "cudnn whole", "gpu", "tokamax"),
    "tpu": ("xla", "splash", "tpu"),
}
WIDTH = 64
SCALE = 0.25 / WIDTH**0.5


class Runs(NamedTuple):
    """One implementation of one shape: both functions return when their result is there."""

    forward: Callable[[], Any]
    both: Callable[[], Any]


def jax_runs(name: str, shape: Shape, batch: int, heads: int, dtype: Any) -> Runs:
    random = np.random.default_rng(0)
    sizes = (shape.queries, shape.keys, shape.keys, shape.queries)
    *qkv, dout = (jnp.asarray(random.standard_normal((batch, size, heads, WIDTH)), dtype) for size in sizes)
    # "cudnn whole" computes all that is masked, and so is wrong: it shows what skipping can save.
    kv_end = None if name == "cudnn whole" else shape.segments
    run = functools.partial(attention, kv_end=kv_end, scale=SCALE, implementation=name.split()[0])

    def both(q, k, v, dout):
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(dout)

    forward = jax.jit(run).lower(*qkv).compile()
    gradient = jax.jit(both).lower(*qkv, dout).compile()
    return Runs(lambda: jax.block_until_ready(forward(*qkv)), lambda: jax.block_until_ready(gradient(*qkv, dout)))


def torch_runs(shape: Shape, batch: int, heads: int) -> Runs:
    """PyTorch's attention on the CPU in float32, with a mask where there is something to mask."""
    import torch

    random = np.random.default_rng(0)
    sizes = (shape.queries, shape.keys, shape.keys, shape.queries)
    drawn = [random.standard_normal((batch, heads, size, WIDTH), np.float32) for size in sizes]
    *qkv, dout = (torch.from_numpy(x) for x in drawn)
    ends = row_ends(shape.segments, shape.queries, shape.keys)[0]
    masked = {} if ends.min() == shape.keys else {"attn_mask": torch.from_numpy(np.arange(shape.keys) < ends[:, None])}
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=SCALE, **masked)

    def forward() -> None:
        with torch.no_grad():
            attend(*qkv)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in qkv]
        attend(*leaves).backward(dout)

    return Runs(forward, both)


def product_rate() -> float:
    """FLOP/s of a matrix product here and now, where no peak is known."""
    x = jnp.ones((2048, 2048))
    multiply = jax.jit(lambda x: x @ x).lower(x).compile()
    jax.block_until_ready(multiply(x))
    start = time.perf_counter()
    for _ in range(4):
        jax.block_until_ready(multiply(x))
    return 4 * 2 * 2048**3 / (time.perf_counter() - start)


def medians(runs: dict[str, Runs], repeats: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Seconds of forward and of both, by implementation, and the median rate of a product meanwhile."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    rates = []
    for _ in range(repeats + 1):
        for name, (forward, both) in runs.items():
            start = time.perf_counter()
            forward()
            middle = time.perf_counter()
            both()
            times[name].append((middle - start, time.perf_counter() - middle))
        rates.append(product_rate())
    # The first round warms up.
    return {name: tuple(np.median(spent[1:], axis=0)) for name, spent in times.items()}, float(np.median(rates))


def runnable(name: str) -> bool:
    """Whether what an implementation needs is installed; says so where it is not."""
    if name == "tokamax" and not tokamax.installed():
        print(f"tokamax: not installed (pip install tokamax=={tokamax.VERSION}, Python 3.12 or newer); not measured")
        return False
    return True


def error_of(name: str, shape: Shape, dtype: str) -> float:
    """The largest of output and gradients, of one head of one sample, against `reference`."""
    case = Case(shape.queries, shape.keys, shape.segments, heads=1, groups=1, batch=1, width=WIDTH, scale=SCALE)
    ours, theirs = (
        gradients(functools.partial(attention, implementation=which), case, dtype) for which in (name, "reference")
    )
    return max(errors(ours, theirs).values())


def measure(names: list[str], batch: int, heads: int, repeats: int, with_torch: bool, write: bool) -> None:
    device = jax.devices()[0]
    platform = device.platform
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    print(
        f"{device.device_kind}, JAX {jax.__version__}, batch {batch}, {heads} heads of {WIDTH}, {jnp.dtype(dtype).name}"
    )
    print("| shape | implementation | forward ms | TFLOP/s | of peak | with backward ms | TFLOP/s | of peak |")
    print("|---|---|---|---|---|---|---|---|")
    ours = tuple(filter(runnable, IMPLEMENTATIONS[platform]))
    for name in names:
        shape, runs = SHAPES[name], {}
        for which in ours:
            try:
                runs[which] = jax_runs(which, shape, batch, heads, dtype)
                for run in runs[which]:
                    run()
            except Exception as error:  # whatever a compiler or driver raises: the others' times are still wanted
                runs.pop(which, None)
                print(f"| {name} | {which} | FAILED: {str(error).splitlines()[0][:200]} | | | | | |", flush=True)
        if with_torch:
            runs["PyTorch"] = torch_runs(shape, batch, heads)
        times, rate = medians(runs, repeats)
        peak = peak_flops(device.device_kind) or rate
        work = shape.pairs * batch * heads * WIDTH
        for which, (forward, both) in times.items():
            speeds = 4 * work / forward, 14 * work / both
            cells = [f"{1e3 * forward:.2f}", *(f"{speeds[0] / 1e12:.3g}", f"{speeds[0] / peak:.0%}")]
            cells += [f"{1e3 * both:.2f}", *(f"{speeds[1] / 1e12:.3g}", f"{speeds[1] / peak:.0%}")]
            print(f"| {name} | {which} | {' | '.join(cells)} |", flush=True)
            if write and which in ATTENTION:
                kind = device.device_kind, name, which, jnp.dtype(dtype).name, WIDTH
                milliseconds = 1e3 * float(forward), 1e3 * float(both)
                today = datetime.date.today().isoformat()
                error = error_of(which, shape, jnp.dtype(dtype).name)
                write_rows([Row(*kind, error, *milliseconds, jax.__version__, today)])
                print(f"{name}, {which}: error {error:.1e}, written into {TABLE_FILE.name}", flush=True)
        if with_torch:
            faster = [theirs / xla for theirs, xla in zip(times["PyTorch"], times["xla"], strict=True)]
            print(f"{name}: {faster[0]:.2f} times as fast as PyTorch forward, {faster[1]:.2f} times with backward")


def count_tiles(names: list[str], tiles: list[tuple[int, int]]) -> None:
    print("| shape | tile | ideal | visited by queries | visited by keys | rows of tiles | more than ideal, per row |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        shape = SHAPES[name]
        for tile in tiles:
            layout = Layout.aligned(shape.segments, *tile)
            end_RQ = layout.pad(row_ends(shape.segments, shape.queries, shape.keys), 1, mode="edge")
            found = tiles_of(end_RQ, -(-shape.keys // tile[1]) * tile[1], *tile)
            ideal, rows = shape.pairs / (tile[0] * tile[1]), layout.rows // tile[0]
            counts = [int(schedule(found).count_R[0]) for schedule in (by_queries, by_keys)]
            print(
                f"| {name} | {tile[0]} x {tile[1]} | {ideal:.1f} | {counts[0]} | {counts[1]} | {rows} | "
                f"{(counts[0] - ideal) / rows:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", action="store_true", help="Beside PyTorch, on a CPU.")
    parser.add_argument("--write", action="store_true", help=f"Puts errors and times into {TABLE_FILE.name}.")
    parser.add_argument("--tiles", action="store_true", help="Only counts the tiles that kernels visit; runs nothing.")
    arguments = parser.parse_args()
    if arguments.write and jax.default_backend() == "cpu":
        raise UserError("--write: the table is of accelerators; a CPU has one implementation")
    if arguments.torch and jax.default_backend() != "cpu":
        raise UserError("--torch: compares on a CPU; on this device it would compare unlike things")
    if arguments.tiles:
        count_tiles(arguments.shapes, [(128, 128), (256, 256), (256, 512), (512, 512), (512, 1024)])
    else:
        sizes = arguments.batch, arguments.heads, arguments.repeats
        measure(arguments.shapes, *sizes, arguments.torch, arguments.write)


if __name__ == "__main__":
    run_cli(main)
