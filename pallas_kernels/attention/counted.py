"""FLOPs of a library's kernel, of which a traced program does not tell what it skips, or nothing at all.

The passes become jitted functions whose names say how many FLOPs they have, of the pairs that see each other alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

NAME = "attention_of_flops_"
Run = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def flops_in(name: str) -> int | None:
    """What the name of a jitted function says, None for any other function."""
    return int(name.removeprefix(NAME)) if name.startswith(NAME) else None


def counted(run: Run, pairs: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`run(q, k, v)` with a name: 2 products forward, and 5 for its gradients, as of a pass that keeps no logits."""
    return _counted(run, 2 * pairs * q.shape[0] * q.shape[2] * q.shape[3], q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _counted(run: Run, product: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _named(run, 2 * product)(q, k, v)


def _forward(run: Run, product: int, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    return _named(lambda q, k, v: jax.vjp(run, q, k, v), 2 * product)(q, k, v)


def _backward(run: Run, product: int, pull: Any, dout: jax.Array) -> tuple[jax.Array, ...]:
    return _named(lambda pull, dout: pull(dout), 5 * product)(pull, dout)


_counted.defvjp(_forward, _backward)


def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` jitted, with a name that says that its products are no work of the model."""
    return _named(function, 0)


def _named(function: Callable[..., Any], flops: int) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    call.__name__ = call.__qualname__ = f"{NAME}{flops}"
    return jax.jit(call)
