"""Finds the fastest tiles on this device: `python -m pallas_kernels.attention.tune --implementation xla --write`.

The forward pass is tuned first, then dQ, dK and dV with it, at one of HART's shapes. Prints every candidate's time;
`--write` puts the best into `blocks.json`, which `attention` reads.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.attention import attention
from pallas_kernels.attention.blocks import TABLE_FILE, Blocks, Row, read_table, write_table
from pallas_kernels.attention.shapes import SHAPES, Shape

# Sizes of tiles to try, of queries and of keys.
CANDIDATES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "xla": ((128, 256, 512, 1024), (512, 1024, 2048, 16384)),
    "tpu": ((256, 512, 1024), (256, 512, 1024, 2048)),
    "gpu": ((128, 192, 256), (64, 96, 128, 192)),
    "splash": ((256, 512, 1024), (256, 512, 1024, 2048)),
}


def tune(
    implementation: str,
    shape: Shape,
    batch: int,
    heads: int,
    width: int,
    dtype: Any,
    repeats: int,
    seconds: float = float("inf"),
) -> Blocks:
    """The fastest tiles that compile within `seconds` for each pass. Raises `RuntimeError` if none does."""
    random = np.random.default_rng(0)
    sizes = (shape.queries, shape.keys, shape.keys, shape.queries)
    *qkv, dout = (jnp.asarray(random.standard_normal((batch, size, heads, width)), dtype) for size in sizes)

    def forward(blocks: Blocks) -> Callable[..., Any]:
        return lambda *qkv: attention(
            *qkv, kv_end=shape.segments, scale=0.125, implementation=implementation, blocks=blocks
        )

    def both(blocks: Blocks) -> Callable[..., Any]:
        return lambda *arrays: jax.vjp(forward(blocks), *arrays[:3])[1](arrays[3])

    tiles = list(itertools.product(*CANDIDATES[implementation]))
    alike = [Blocks(tile, tile, tile) for tile in tiles]
    if implementation == "xla":
        # It has the same tiles in both passes.
        return fastest("with gradients", alike, both, (*qkv, dout), repeats, seconds)
    best = fastest("forward", alike, forward, tuple(qkv), repeats, seconds)
    changed = (dataclasses.replace(best, dq=tile, dkv=tile) for tile in tiles)
    return fastest("with gradients", changed, both, (*qkv, dout), repeats, seconds)


def fastest(
    name: str,
    candidates: Iterable[Blocks],
    make: Callable[[Blocks], Callable[..., Any]],
    arguments: tuple[jax.Array, ...],
    repeats: int,
    seconds: float,
) -> Blocks:
    """The candidate with the smallest median time; those that compile, begun within `seconds`, run in turns."""
    compiled: dict[Blocks, Callable[..., Any]] = {}
    until = time.perf_counter() + seconds
    for blocks in tqdm(list(candidates), desc=f"compiling {name}"):
        if compiled and time.perf_counter() > until:
            tqdm.write(f"{blocks}: not tried: {seconds:.0f} s are over")
            continue
        try:
            compiled[blocks] = jax.jit(make(blocks)).lower(*arguments).compile()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            tqdm.write(f"{blocks}: does not compile: {str(error).splitlines()[0][:120]}")
    if not compiled:
        raise RuntimeError(f"{name}: no candidate compiles on {jax.devices()[0].device_kind}")
    times: dict[Blocks, list[float]] = {blocks: [] for blocks in compiled}
    for _ in tqdm(range(repeats + 1), desc=f"timing {name}"):
        for blocks, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times[blocks].append(time.perf_counter() - start)
    # The first round warms up.
    medians = {blocks: float(np.median(spent[1:])) for blocks, spent in times.items()}
    for blocks, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name}: {1e3 * seconds:9.3f} ms  {blocks}")
    return min(medians, key=medians.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", required=True, choices=CANDIDATES)
    parser.add_argument("--shape", default="1024", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", help="Default: float32 on a CPU, bfloat16 elsewhere.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Of compiling candidates, in each pass.")
    parser.add_argument("--write", action="store_true", help=f"Puts the best into {TABLE_FILE.name}.")
    arguments = parser.parse_args()
    kind = jax.devices()[0].device_kind
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    sizes = arguments.batch, arguments.heads, arguments.width
    try:
        best = tune(
            arguments.implementation, SHAPES[arguments.shape], *sizes, dtype, arguments.repeats, arguments.seconds
        )
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"{kind}, heads of {arguments.width}: {best}")
    if arguments.write:
        width_bytes = arguments.width * jnp.dtype(dtype).itemsize
        row = Row(arguments.implementation, kind, width_bytes, SHAPES[arguments.shape].queries, best)
        write_table([row, *(other for other in read_table() if other.key != row.key)])


if __name__ == "__main__":
    main()
