"""Every implementation of attention against the reference: `python -m pallas_kernels.attention.conformance`.

Output and all three gradients, for every case below that an implementation has; what it lacks is said. Exit code 1
where something is wrong. The tests run the same cases, interpreted; on a device this is what tells whether its kernels
are right.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import attention, tokamax

# What runs on a platform.
BY_PLATFORM = {"cpu": ("xla",), "gpu": ("gpu", "tokamax", "cudnn", "xla"), "tpu": ("tpu", "splash", "xla")}
# Of max|a - b| / max|b|.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-2}
PARTS = ("out", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    queries: int
    keys: int
    kv_end: Any = None
    heads: int = 2
    groups: int = 2
    width: int = 64
    batch: int = 2
    scale: float = 0.125
    size: float = 1.0
    # Queries and keys are multiples of it: logits of multiples of a power of two have no rounding, in whatever order.
    step: float | None = None
    dtypes: tuple[str, ...] = ("float32",)

    def arrays(self, dtype: str) -> tuple[jax.Array, ...]:
        """q, k, v and a gradient of the output."""
        rng = np.random.default_rng(0)
        of_queries, of_keys = (self.queries, self.heads), (self.keys, self.groups)
        drawn = [
            rng.standard_normal((self.batch, *form, self.width)) for form in (of_queries, of_keys, of_keys, of_queries)
        ]
        for x in drawn[:2]:
            x *= self.size
            if self.step:
                np.round(x / self.step, out=x)
                x *= self.step
        return tuple(jnp.asarray(x, dtype) for x in drawn)


def ends(*shape: int, most: int) -> np.ndarray:
    """In no order, some of them 0."""
    return np.random.default_rng(1).integers(0, most + 1, shape).astype(np.int32) * (np.arange(shape[-1]) % 7 > 0)


_BOTH = ("float32", "bfloat16")
_SCALES = ((70, 70), (1, 71), (4, 75), (9, 84), (116, 200))
CASES = {
    "scales": Case(200, 200, _SCALES, dtypes=("float32", "bfloat16", "float16")),
    "whole": Case(131, 257, dtypes=_BOTH),
    "one token each": Case(40, 40, tuple((1, end) for end in range(1, 41))),
    "shared keys": Case(200, 230, _SCALES, heads=4, groups=2, dtypes=_BOTH),
    "width 48": Case(200, 200, _SCALES, width=48),
    "width 128": Case(200, 200, _SCALES, width=128, dtypes=_BOTH),
    # exp of such logits is infinite, and a rounding of them would by itself be a change of 1e-5.
    "large inputs": Case(200, 200, _SCALES, size=6.0, step=1 / 16, dtypes=_BOTH),
    "one query": Case(1, 300, ((1, 299),)),
    "traced": Case(200, 260, ends(200, most=260), dtypes=_BOTH),
    "traced by sample": Case(150, 260, ends(2, 150, most=260)),
}


def gradients(run: Callable[..., jax.Array], case: Case, dtype: str) -> list[np.ndarray]:
    """Output and gradients of q, k and v, in float32."""
    *qkv, dout = case.arrays(dtype)

    def both(q, k, v, dout, kv_end):
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, kv_end=kv_end, scale=case.scale), q, k, v)
        return out, *pull(dout)

    if isinstance(case.kv_end, np.ndarray):
        results = jax.jit(both)(*qkv, dout, case.kv_end)
    else:
        results = jax.jit(functools.partial(both, kv_end=case.kv_end))(*qkv, dout)
    assert all(x.dtype == dtype for x in results)
    return [np.asarray(x, np.float32) for x in results]


def errors(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Of output and gradients, max|a - b| as a share of max|b|; infinite where something is not finite.

    Gradients of a softmax over one key are zero, but for rounding: what is below 0.1 counts as 0.1.
    """
    found = {}
    for name, a, b in zip(PARTS, ours, theirs, strict=True):
        finite = bool(np.all(np.isfinite(a)))
        found[name] = float(np.abs(a - b).max() / max(0.1, np.abs(b).max())) if finite else float("inf")
    return found


def report(names: list[str], cases: list[str]) -> bool:
    """Prints a row for each implementation, case and type; whether all that there is is right."""
    device, right = jax.devices()[0], True
    print(f"{device.device_kind}, JAX {jax.__version__}: errors against `reference`, of the largest value")
    print(f"| implementation | case | type | {' | '.join(PARTS)} | bound | |\n{'|---' * (5 + len(PARTS))}|")
    for name in names:
        for case in cases:
            # A case of single precision is one for half precision too, where a kernel has nothing else.
            dtypes = dict.fromkeys((*CASES[case].dtypes, *(("bfloat16",) if name not in ("xla", "tpu") else ())))
            for dtype in dtypes:
                cells, verdict = ["", "", "", ""], "right"
                try:
                    ours = gradients(functools.partial(attention, implementation=name), CASES[case], dtype)
                except NotImplementedError as error:
                    verdict = f"lacks it: {error}"
                except Exception as error:  # whatever a compiler or driver raises: the other rows are still wanted
                    verdict, right = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:200]}", False
                else:
                    found = errors(ours, _expected(case, dtype))
                    cells = [f"{error:.1e}" for error in found.values()]
                    if max(found.values()) > BOUNDS[dtype]:
                        verdict, right = "WRONG", False
                bound = f"{BOUNDS[dtype]:.0e}"
                print(f"| {name} | {case} | {dtype} | {' | '.join(cells)} | {bound} | {verdict} |", flush=True)
    return right


@functools.cache
def _expected(case: str, dtype: str) -> list[np.ndarray]:
    return gradients(functools.partial(attention, implementation="reference"), CASES[case], dtype)


def here() -> tuple[str, ...]:
    """The implementations that run on this device."""
    names = BY_PLATFORM[jax.devices()[0].platform]
    return tuple(name for name in names if name != "tokamax" or tokamax.installed())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted({name for names in BY_PLATFORM.values() for name in names})
    parser.add_argument("--implementations", nargs="+", choices=every, help="Default: all that run on this device.")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    asked, runnable = arguments.implementations or here(), here()
    for name in asked:
        if name not in runnable:
            print(f"{name}: cannot run on {jax.devices()[0].device_kind} as installed here; not checked")
    right = report([name for name in asked if name in runnable], arguments.cases)
    print("all right" if right else "something is wrong")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
