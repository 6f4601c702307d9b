"""Which mesh axis splits which logical axis: the one table that lays out parameters, optimiser state, activations.

Every parameter of the models names its axes (`nn.with_logical_partitioning`); a mesh has the axes `data` (copies),
`fsdp` (copies of the batch, parts of the parameters) and `tensor` (parts of one layer's products).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from hart_jax.errors import UserError

AnyMesh = Mesh | AbstractMesh
AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, tuple[str, ...]]
# Logical axes of each parameter, by its path.
ParameterAxes = Mapping[tuple[str, ...], tuple[str | None, ...]]

# What is not named here is whole on every device. An axis of the mesh splits at most one axis of an array, the first
# that asks for it: batches take `fsdp` from the width of activations.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "diffusion": ("fsdp",),
    "conv_out": ("fsdp",),
    "heads": ("tensor",),
    "heads_out": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def with_changes(changes: tuple[str, ...]) -> Rules:
    """The table with changes such as "mlp=fsdp", "batch=data+fsdp" or "vocab=" (whole on every device).

    Raises:
      UserError: a change of another form, or of an axis that does not exist.
    """
    rules = dict(RULES)
    for change in changes:
        logical, equals, axes = change.partition("=")
        names = tuple(axes.split("+")) if axes else ()
        if not equals or logical not in RULES:
            raise UserError(f"mesh.rules: unknown rule {change!r}; write AXIS=MESH_AXIS with one of {', '.join(RULES)}")
        if set(names) - set(AXES):
            raise UserError(f"mesh.rules: {change!r} names no axis of the mesh; it has {', '.join(AXES)}")
        rules[logical] = names
    return rules


def parameter_axes(boxed: Any) -> ParameterAxes:
    """The logical axes of every parameter of an initialised (possibly abstract) module, before `nn.unbox`."""
    specs = nn.get_partition_spec(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    return {_names(path): tuple(spec) for path, spec in leaves}


def shardings(state: Any, parameters: ParameterAxes, mesh: AnyMesh, rules: Rules) -> Any:
    """Where each array of a state lies, as a tree of `NamedSharding`.

    Averages and moments have the paths of the parameters they belong to, at the end of their own, and lie as these do.
    Everything else, and every axis that a rule does not divide evenly, is whole on every device.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _names(path)
        ends = (parameters.get(names[start:]) for start in range(len(names)))
        axes = next((end for end in ends if end is not None and len(end) == leaf.ndim), (None,) * leaf.ndim)
        return NamedSharding(mesh, _spec(axes, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(place, state)


def _spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AnyMesh, rules: Rules) -> PartitionSpec:
    taken: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = rules.get(axis or "", ())
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        fits = not taken & set(names) and size % parts == 0
        spec.append(names if names and fits else None)
        taken |= set(names) if fits else set()
    return PartitionSpec(*spec)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey))
