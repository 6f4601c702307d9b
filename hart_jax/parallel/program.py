"""Whole programs: what is compiled for all devices of a mesh, always traced within it and at its type's precision."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from hart_jax.parallel.mesh import MeshLayout


class Program:
    """A function that a command compiles; everything that runs on devices goes through one.

    However it is called, it is traced within the mesh that its arrays lie on: on accelerators, attention's kernels are
    refused in a program of several devices that does not split them. Products of a float32 program are float32
    products, where TPUs and GPUs would otherwise round their inputs.

    Attributes:
      name: tests/test_lowering.py lowers every program by its name.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        layout: MeshLayout | None = None,
        dtype: Any = jnp.float32,
        **options: Any,
    ):
        """Takes the type that is computed in (None: float32) and options of `jax.jit`. Without a layout the program
        is for one device, or traced within what its caller calls it in."""
        self.name, self._layout, self._dtype = name, layout, jnp.dtype(dtype or jnp.float32)
        self._function = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        bare = self._layout is None and jax.sharding.get_abstract_mesh().empty
        # However well that computes on CPUs, an accelerator's kernels are refused in it.
        if bare and any(map(_over_devices, jax.tree.leaves((arguments, keywords)))):
            raise ValueError(f"program {self.name!r}: its arrays lie on several devices, but it has no layout")
        with self._tracing():
            return self._function(*arguments, **keywords)

    def trace(self, *arguments: Any, **keywords: Any) -> Any:
        """Traced, not compiled: `jax.stages.Traced`."""
        with self._tracing():
            return self._function.trace(*arguments, **keywords)

    def lower(self, *arguments: Any, platform: str | None = None, **keywords: Any) -> Any:
        """Lowered, not compiled, for this platform or the one there is: `jax.stages.Lowered`."""
        with self._tracing():
            traced = self._function.trace(*arguments, **keywords)
            return traced.lower(lowering_platforms=(platform,) if platform else None)

    def shapes(self, *arguments: Any, **keywords: Any) -> Any:
        """Shapes and types of what it gives; nothing is computed."""
        with self._tracing():
            return jax.eval_shape(self._function, *arguments, **keywords)

    def giving(self, shardings: Any) -> "Program":
        """This program, whose results lie at `shardings`; it is not traced again."""
        return Program(self.name, self._function, self._layout, self._dtype, out_shardings=shardings)

    @contextlib.contextmanager
    def _tracing(self) -> Iterator[None]:
        exact = self._dtype == jnp.float32
        with (
            self._layout.activate() if self._layout else contextlib.nullcontext(),
            jax.default_matmul_precision("highest") if exact else contextlib.nullcontext(),
        ):
            yield


def _over_devices(leaf: Any) -> bool:
    """Whether it is an array, not one that is traced, over several devices."""
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return is_array and len(leaf.sharding.device_set) > 1
