"""How many floating-point operations a training step takes, and how many a device can do."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from pallas_kernels.attention.counted import flops_in

# Dense bfloat16 FLOP/s of one chip as its maker states it, by the beginning of `device_kind`; the first match counts.
_PEAK = {
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bfloat16, None for a kind that is not in the table."""
    return next((peak for kind, peak in _PEAK.items() if device_kind.startswith(kind)), None)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, of all devices together.

    `model` is three times the forward pass of what is trained: a backward pass takes twice as many. That is what model
    FLOPs utilisation (MFU) counts (Chowdhery et al., arXiv 2204.02311, appendix B). `hardware` is all that the step
    computes, what rematerialisation repeats and the frozen networks too: hardware FLOPs utilisation (HFU).
    """

    model: float
    hardware: float

    def metrics(self) -> dict[str, float]:
        return {"model_flops": self.model, "hardware_flops": self.hardware}


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """`flops_of` a function of these arrays, or of their shapes; nothing is computed."""
    return flops_of(jax.make_jaxpr(function)(*arguments).jaxpr)


def flops_of(jaxpr: Jaxpr) -> float:
    """FLOPs of a traced function's `products_of`."""
    return sum(product.flops for product in products_of(jaxpr))


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product, a convolution, or a kernel that says how many FLOPs it has.

    `flops` are those of all times that it runs, on all devices together; `size` is how many numbers its result has, 0
    of a kernel; `window` are the sides of a convolution's kernel, () for all others.
    """

    flops: float
    size: int = 0
    window: tuple[int, ...] = ()


def products_of(jaxpr: Jaxpr) -> list[Product]:
    """All products of a traced function, in order.

    They are counted as traced, not as compiled: one in a scan counts as often as it runs, one that rematerialisation
    repeats counts again, one in a `while_loop` counts once.
    """
    return [product for equation in jaxpr.eqns for product in _of_equation(equation)]


def _of_equation(equation: Any) -> list[Product]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape, size = equation.invars[0].aval.shape, equation.outvars[0].aval.size
        return [Product(2.0 * size * math.prod(shape[axis] for axis in contracted), size)]
    if name == "conv_general_dilated":
        (out, _, *sides), size = params["dimension_numbers"].rhs_spec, equation.outvars[0].aval.size
        kernel = equation.invars[1].aval
        per_output = kernel.size / kernel.shape[out]
        # Zeros between the inputs (gradients of strided convolutions) need no product.
        flops = 2.0 * size * per_output / math.prod(params["lhs_dilation"])
        return [Product(flops, size, tuple(kernel.shape[side] for side in sides))]
    if name in ("jit", "pjit") and (stated := flops_in(params["name"])) is not None:
        return [Product(float(stated))]
    inner = [products_of(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        return max(inner, key=lambda branch: sum(product.flops for product in branch))
    flat = [product for products in inner for product in products]
    if name == "scan":
        return _repeated(flat, params["length"])
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        # A kernel that skips part of its grid says what is left.
        return [Product(float(estimate.flops))] if estimate else _repeated(flat, math.prod(params["grid_mapping"].grid))
    if name == "shard_map":
        # Devices along axes that split nothing repeat each other's work, which counts once.
        specs = jax.tree.leaves((params["in_specs"], params["out_specs"]), is_leaf=lambda x: x is None)
        axes = {name for spec in specs for entry in spec or () for name in _names(entry)}
        return _repeated(flat, math.prod(params["mesh"].shape[axis] for axis in axes))
    return flat


def _repeated(products: list[Product], times: int) -> list[Product]:
    return [dataclasses.replace(product, flops=times * product.flops) for product in products]


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Axes of a mesh that split one axis of an array."""
    return (entry,) if isinstance(entry, str) else entry or ()


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Jaxpr):
                yield item
            elif isinstance(item, ClosedJaxpr):
                yield item.jaxpr
