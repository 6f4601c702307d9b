"""What compilers make of the attention kernels, without a device: `python benchmarks/attention_compiled.py --tpu`.

`--tpu` compiles them for one chip of every kind with libtpu and prints the VMEM that each uses; `--gpu` compiles them
for an H200 down to machine code with JAX's CUDA plug-in and ptxas and prints registers and spills; with
`--implementation tokamax` that package's kernels. Nothing runs.
"""

import argparse
import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from hart_jax.errors import UserError, run_cli

KINDS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
HEADS, BATCH = 24, 2


class Hopper:
    """What tokamax asks the default device, which is this machine's, for."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 132


@contextlib.contextmanager
def as_on_hopper() -> Iterator[None]:
    """Within it, tokamax traces what it runs on an H200."""
    with mock.patch("jax.extend.backend.get_default_device", lambda: Hopper()):
        yield


def compiled(
    topology: str, name: str, width: int, dtype: str, traced: bool, implementation: str = ""
) -> tuple[Any, float]:
    """Forward and gradients at one shape, of one device of a topology, and the seconds of compiling.

    `implementation`: by default the kernels of this project for the kind of device.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from hart_jax.planning.topology import read_topology
    from pallas_kernels.attention import attention
    from pallas_kernels.attention.shapes import SHAPES

    jax.config.update("jax_platforms", "cpu")
    devices = read_topology(topology).devices
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:1])
    place, shape = NamedSharding(mesh, PartitionSpec()), SHAPES[name]

    def of(*sizes: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=place)

    q, k = (of(BATCH, length, HEADS, width) for length in (shape.queries, shape.keys))
    ends = [of(shape.queries, dtype="int32")] if traced else []

    def both(q, k, v, dout, *ends):
        def run(*qkv):
            kv_end = ends[0] if ends else shape.segments
            ours = "gpu" if topology.startswith("h") else "tpu"
            return attention(*qkv, kv_end=kv_end, scale=width**-0.5, implementation=implementation or ours)

        out, pull = jax.vjp(run, q, k, v)
        return out, pull(dout)

    start = time.monotonic()
    with jax.set_mesh(mesh), as_on_hopper() if implementation == "tokamax" else contextlib.nullcontext():
        return jax.jit(both).lower(q, k, k, q, *ends).compile(), time.monotonic() - start


def vmem_of(text: str) -> dict[str, int]:
    """Bytes of VMEM of each attention kernel in a program compiled for a TPU; XLA's own fusions are not counted."""
    used = {}
    for line in text.splitlines():
        found = re.search(r'used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
        if found and "tpu_custom_call" in line and (kernel := re.search(r"%attention_(\w+)", line)):
            used[kernel[1]] = int(found[1])
    return used


def tpu_table(kinds: list[str], names: list[str], widths: list[int], dtypes: list[str]) -> None:
    print("| chip | shape | type | width | VMEM MiB: forward, backward | temporaries MiB | compiled in s |")
    print("|---|---|---|---|---|---|---|")
    for topology, name, dtype, width in itertools.product(kinds, names, dtypes, widths):
        program, seconds = compiled(topology, name, width, dtype, traced="decode" in name)
        used = [f"{kernel} {size / 2**20:.1f}" for kernel, size in vmem_of(program.as_text()).items()]
        temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
        cells = [topology.split(":")[0], name, dtype, str(width), ", ".join(used), f"{temporaries:.0f}"]
        print(f"| {' | '.join(cells)} | {seconds:.0f} |", flush=True)


def gpu_table(names: list[str], widths: list[int], dtypes: list[str], implementation: str) -> None:
    """ptxas prints past Python, so each shape has a process of its own."""
    print(
        "| shape | type | width | kernel | registers | spilled bytes | temporaries MiB |\n|---|---|---|---|---|---|---|"
    )
    for name, dtype, width in itertools.product(names, dtypes, widths):
        command = [sys.executable, __file__, "--one", name, dtype, str(width), "--implementation", implementation]
        environment = {**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
        text = done.stdout + done.stderr
        temporaries = re.search(r"temporaries (\d+)", text)
        kernels = re.findall(r"Compiling entry function '(\w+?)'", text)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.findall(r"Used (\d+) registers", text)
        for kernel, used, (stored, loaded) in zip(kernels, registers, spills, strict=True):
            cells = [name, dtype, str(width), kernel, used, str(int(stored) + int(loaded))]
            print(f"| {' | '.join(cells)} | {temporaries[1] if temporaries else ''} |", flush=True)


def main() -> None:
    from pallas_kernels.attention.shapes import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tpu", nargs="*", metavar="TOPOLOGY", help=f"Default: {' '.join(KINDS)}.")
    where.add_argument("--gpu", action="store_true")
    where.add_argument("--one", nargs=3, metavar=("SHAPE", "TYPE", "WIDTH"), help=argparse.SUPPRESS)
    parser.add_argument("--implementation", choices=("gpu", "tokamax"), default="gpu", help="With --gpu.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--widths", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    arguments = parser.parse_args()
    if arguments.one:
        name, dtype, width = arguments.one
        program, _ = compiled("h200:1", name, int(width), dtype, "decode" in name, arguments.implementation)
        print("temporaries", program.memory_analysis().temp_size_in_bytes >> 20)
    elif arguments.gpu:
        gpu_table(arguments.shapes, arguments.widths, arguments.dtypes, arguments.implementation)
    else:
        tpu_table(arguments.tpu or list(KINDS), arguments.shapes, arguments.widths, arguments.dtypes)


if __name__ == "__main__":
    run_cli(main)
