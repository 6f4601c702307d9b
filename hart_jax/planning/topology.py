"""Devices to compile for that are not here: TPU slices through libtpu, GPUs through JAX's CUDA plug-in."""

import dataclasses
import os
import re
from typing import Any

from jax.experimental import topologies

from hart_jax.errors import UserError
from hart_jax.parallel.chips import CHIPS, Chip

_FORMS = "v5e:16x16, 4*v5e:16x16 (four slices), v5p:8x8x4, h200:8 or h200:4x8 (four hosts of eight)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices, in `slices` slices, what one of them can do, and how many together have no slower links between
    them: those of a slice, or of a host of GPUs; 0: all."""

    devices: list[Any]
    chip: Chip
    slices: int
    devices_per_island: int


def read_topology(name: str) -> Topology:
    """The topology "v5e:16x16", "h200:8", or "4*v5e:16x16" of four slices that a data-centre network connects.

    Hosts of GPUs are "h200:4x8" or "4*h200:8"; the second asks for a mesh with `data` over the hosts.

    Raises:
      UserError: an unknown kind or shape, or the compiler for it is not installed.
    """
    count, times, one = name.rpartition("*")
    kind, _, shape = one.partition(":")
    if times and re.fullmatch("[1-9][0-9]*", count) is None:
        raise UserError(f"--topology={name}: {count!r} is no number of slices; write {_FORMS}")
    slices = int(count or 1)
    if kind not in CHIPS:
        raise UserError(f"--topology={name}: unknown kind {kind!r}; kinds are {', '.join(CHIPS)}, written as {_FORMS}")
    gpu = kind.startswith("h")
    sides = 2 if gpu else 3
    if re.fullmatch(rf"[1-9][0-9]*(x[1-9][0-9]*){{0,{sides - 1}}}", shape) is None:
        raise UserError(f"--topology={name}: {shape!r} is no shape of {kind}; write {_FORMS}")
    hosts, _, each = shape.rpartition("x")
    try:
        if gpu:
            found = topologies.get_topology_desc(
                f"NVIDIA {kind.upper()}",
                platform="cuda",
                topology=f"{slices}x{hosts or 1}x{each}",
                target_config=_target(kind),
            )
        else:
            # Or libtpu asks a metadata server, and complains.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            # No chip is used, so that several plans can be made at a time.
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
            # One chip is a host of its own.
            if set(shape.split("x")) == {"1"}:
                options["chips_per_host_bounds"] = (1, 1, 1)
            found = topologies.get_topology_desc(one, platform="tpu", **options)
    except Exception as error:  # each plug-in raises its own kinds
        package = "gpu" if gpu else "tpu"
        raise UserError(
            f"--topology={name}: cannot compile for it ({str(error).splitlines()[0]}); install its compiler with "
            f'pip install "hart_jax[{package}]" (no {package.upper()} is needed), and check the shape'
        ) from error
    devices = list(found.devices)
    island = int(each) if gpu else len(devices) // slices
    return Topology(devices, CHIPS[kind], slices, island if island < len(devices) else 0)


def _target(kind: str) -> str:
    """A Hopper GPU as XLA's cost model and code generator see it."""
    chip = CHIPS[kind]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: {int(chip.bandwidth)} device_memory_size: {chip.memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA {kind.upper()}"
"""
