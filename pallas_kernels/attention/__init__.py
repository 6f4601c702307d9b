"""Attention in which every query sees the keys before its own end, by the implementation that suits the device.

    from pallas_kernels.attention import attention
    out = attention(q, k, v, kv_end=((300, 300), (4, 304), (9, 313)), scale=0.125)

`reference` is the meaning; `xla` runs anywhere; `tpu` and `gpu` are Pallas kernels; `splash`, `cudnn` and `tokamax` are
what JAX, NVIDIA and the package tokamax have.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn, flash, reference, tokamax
from pallas_kernels.attention.blocks import Blocks, blocks_for
from pallas_kernels.attention.counted import counted
from pallas_kernels.attention.mask import KVEnd, Segments
from pallas_kernels.attention.measured import fastest

IMPLEMENTATIONS = ("auto", "reference", "xla", "tpu", "gpu", "splash", "cudnn", "tokamax")

# Libraries' kernels fill up fewer queries to whole tiles.
MIN_QUERIES = 128

__all__ = ["IMPLEMENTATIONS", "Blocks", "KVEnd", "Segments", "attention"]


def attention(
    q_BQHK: jax.Array,
    k_BMGK: jax.Array,
    v_BMGK: jax.Array,
    *,
    kv_end: KVEnd = None,
    scale: float,
    implementation: str = "auto",
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v, where a query sees the keys before its end; (B, Q, H, K) in the type of v.

    Softmax is in float32. Differentiable in q, k and v, under jit, vmap, scan and rematerialisation, and under
    `jax.shard_map` over batch and heads; no (Q, M) array exists, except in `reference`.

    Args:
      q_BQHK: bfloat16, float16 or float32; width K of 32 to 256.
      k_BMGK, v_BMGK: the same type; G heads, each of which H / G heads of queries share.
      kv_end: segments of queries in order, each with the end of its keys, ((queries, end), ...), known before tracing:
        nothing beyond them is computed. Or an int32 array (Q,) or (B, Q): a query whose end is 0 gets zeros. None:
        every query sees every key.
      implementation: one of `IMPLEMENTATIONS`; see `_best` for "auto".
      blocks: sizes of the tiles; None takes those of the table in `blocks.py`.
      interpret: runs a Pallas kernel on a CPU, slowly.

    Raises:
      ValueError: shapes, types or ends do not belong together, or the name is unknown.
      NotImplementedError: the implementation lacks this type, width or form of `kv_end`.
    """
    _check(q_BQHK, k_BMGK, v_BMGK, kv_end)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        implementation = _best(q_BQHK, kv_end)
    arguments = q_BQHK, k_BMGK, v_BMGK
    if implementation == "reference":
        return reference.attention(*arguments, kv_end=kv_end, scale=scale)
    if implementation == "cudnn":
        run = functools.partial(cudnn.attention, kv_end=kv_end, scale=scale)
        return counted(run, _pairs(q_BQHK, k_BMGK, kv_end), *arguments)
    if implementation == "tokamax":
        run = functools.partial(tokamax.attention, scale=scale, interpret=interpret)
        pairs = _pairs(q_BQHK, k_BMGK, kv_end)
        if kv_end is None or isinstance(kv_end, tuple):
            return counted(functools.partial(run, kv_end=kv_end), pairs, *arguments)
        return counted(lambda *arrays: run(*arrays[:3], kv_end=arrays[3]), pairs, *arguments, kv_end)
    if blocks is None:
        width_bytes = q_BQHK.shape[3] * q_BQHK.dtype.itemsize
        blocks = blocks_for(implementation, _device().device_kind, width_bytes, q_BQHK.shape[1])
    # Imported where it is used: a device's kernels take a while.
    module = importlib.import_module(f"pallas_kernels.attention.{implementation}")
    settings: dict[str, Any] = {"kv_end": kv_end, "scale": scale, "blocks": blocks, "interpret": interpret}
    if implementation == "splash":
        run = functools.partial(module.attention, **settings)
        return counted(run, _pairs(q_BQHK, k_BMGK, kv_end), *arguments)
    on_cpu = implementation == "xla" and _device().platform == "cpu"
    return flash.attention(*arguments, **settings, kernels=module.CPU_KERNELS if on_cpu else module.KERNELS)


def _pairs(q_BQHK: jax.Array, k_BMGK: jax.Array, kv_end: KVEnd) -> int:
    """Of query and key that see each other; all of them where ends are traced."""
    queries, keys = q_BQHK.shape[1], k_BMGK.shape[1]
    return sum(size * end for size, end in kv_end) if isinstance(kv_end, tuple) else queries * keys


def _best(q_BQHK: jax.Array, kv_end: KVEnd) -> str:
    """The fastest implementation that is known to be right on the device.

    On TPUs and GPUs that is what JAX and NVIDIA have, for what it can do, until the table of `measured.py` says that
    another was right and faster there.
    """
    static = kv_end is None or isinstance(kv_end, tuple)
    if static and q_BQHK.shape[1] >= MIN_QUERIES:
        device = _device()
        measured = device.device_kind, q_BQHK.shape[1], q_BQHK.dtype.name, q_BQHK.shape[3]
        if device.platform == "tpu" and q_BQHK.dtype == jnp.bfloat16:
            return fastest("splash", ("tpu",), *measured)
        if device.platform in ("gpu", "cuda") and cudnn.has(q_BQHK):
            return fastest("cudnn", ("gpu", "tokamax") if tokamax.installed() else ("gpu",), *measured)
    return "xla"


def _device() -> Any:
    """One of the devices that are traced for: of the mesh, where there is one, or of this machine."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _check(q: jax.Array, k: jax.Array, v: jax.Array, kv_end: KVEnd) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(f"{shapes}: must be (B, Q, H, K), (B, M, G, K), (B, M, G, K)")
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{shapes}: widths must be the same, and heads of k and v divide those of q")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: must all be bfloat16, float16 or float32")
    if kv_end is None:
        return
    if isinstance(kv_end, tuple):
        if sum(size for size, _ in kv_end) != q.shape[1]:
            raise ValueError(f"kv_end={kv_end} does not cover the {q.shape[1]} queries")
        if any(size < 1 or not 1 <= end <= k.shape[1] for size, end in kv_end):
            raise ValueError(f"kv_end={kv_end}: sizes must be 1 or more, ends in 1..{k.shape[1]}")
    elif kv_end.shape not in ((q.shape[1],), q.shape[:2]) or not jnp.issubdtype(kv_end.dtype, jnp.integer):
        raise ValueError(f"kv_end {kv_end.dtype}{kv_end.shape}: must be integers, (Q,) or (B, Q) for q {q.shape}")
