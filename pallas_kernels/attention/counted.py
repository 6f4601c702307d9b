"""FLOPs of a library's kernel, of which a traced program does not tell what it skips, or nothing at all.

The passes become jitted functions whose names say how many FLOPs they have, of the pairs that see each other alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

NAME = "attention_of_flops_"
Run = Callable[..., jax.Array]


def flops_in(name: str) -> int | None:
    """What the name of a jitted function says, None for any other function."""
    return int(name.removeprefix(NAME)) if name.startswith(NAME) else None


def counted(run: Run, pairs: int, q: jax.Array, k: jax.Array, v: jax.Array, *ends: jax.Array) -> jax.Array:
    """`run(q, k, v, *ends)` with a name: 2 products forward, and 5 for its gradients, as of a pass that keeps no
    logits. `ends` are integers, and have no gradients."""
    return _counted(run, 2 * pairs * q.shape[0] * q.shape[2] * q.shape[3], q, k, v, *ends)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _counted(run: Run, product: int, q: jax.Array, k: jax.Array, v: jax.Array, *ends: jax.Array) -> jax.Array:
    return _named(run, 2 * product)(q, k, v, *ends)


def _forward(
    run: Run, product: int, q: jax.Array, k: jax.Array, v: jax.Array, *ends: jax.Array
) -> tuple[jax.Array, Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, *ends: jax.Array) -> Any:
        return jax.vjp(lambda *qkv: run(*qkv, *ends), q, k, v)

    out, pull = _named(both, 2 * product)(q, k, v, *ends)
    return out, (pull, (None,) * len(ends))


def _backward(run: Run, product: int, saved: Any, dout: jax.Array) -> tuple[jax.Array | None, ...]:
    pull, no_gradients = saved
    return *_named(lambda pull, dout: pull(dout), 5 * product)(pull, dout), *no_gradients


_counted.defvjp(_forward, _backward)


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` jitted, with a name that says that its products are no work of the model."""
    return _named(function, 0)


def _named(function: Callable[..., Any], flops: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = call.__qualname__ = f"{NAME}{flops}"
    return jax.jit(call)
