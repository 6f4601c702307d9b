"""The devices of a run as one mesh, and batches on it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hart_jax.config import MeshConfig
from hart_jax.errors import UserError
from hart_jax.parallel.rules import AXES, ParameterAxes, Rules, shardings, with_changes


def make_mesh(
    config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None, accumulate: int = 1
) -> Mesh:
    """The mesh (data, fsdp, tensor) over all devices of all processes, for batches in `accumulate` parts.

    Where there are several slices (see `slices_of`), each holds a run of equal length of the axis `data`.

    Raises:
      UserError: the sizes do not multiply to the number of devices, do not divide a part of the batch, or do not lie
        within slices.
    """
    found = jax.devices() if devices is None else devices
    count = len(found)
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // known
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if int(np.prod(sizes)) != count:
        raise UserError(f"mesh: {shown} does not multiply to the {count} devices; -1 takes the rest")
    factors = {"data": sizes[0], "fsdp": sizes[1]} | ({"train.accumulate": accumulate} if accumulate > 1 else {})
    if batch_size % math.prod(factors.values()):
        needed = f"{'*'.join(factors)}={math.prod(factors.values())}"
        raise UserError(f"train.batch_size={batch_size}: must be a multiple of {needed} (mesh: {shown})")
    slices = slices_of(config, found)
    if sizes[0] % slices:
        raise UserError(
            f"mesh: {shown} over {slices} slices: data must be a multiple of them, so that fsdp*tensor lies within one"
        )
    # Flax's logical constraints need Auto axes.
    kinds = (AxisType.Auto,) * len(AXES)
    if slices > 1:
        return Mesh(_over_slices(sizes, slices, found), AXES, axis_types=kinds)
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:
        # No sides of the pod's torus multiply to one of the sizes: 16 on 8x8x4. It then has part of a side.
        return Mesh(mesh_utils.create_device_mesh(sizes, found, allow_split_physical_axes=True), AXES, axis_types=kinds)


def slices_of(config: MeshConfig, devices: Sequence[jax.Device]) -> int:
    """How many slices the mesh's axis `data` crosses: `mesh.slices`, or 0 there: those of TPUs, else 1."""
    if config.slices:
        return config.slices
    tpu = getattr(devices[0], "platform", "") == "tpu"
    return len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1


def _over_slices(sizes: Sequence[int], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices (data, fsdp, tensor), slice after slice along `data`. A slice is what the devices call one, or a
    process; devices of one process that know no slices are taken in order."""
    within, over = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    counts = {by: len({getattr(device, by, 0) for device in devices}) for by in ("slice_index", "process_index")}
    if slices in counts.values():
        by_process = counts["slice_index"] != slices
        make = functools.partial(
            mesh_utils.create_hybrid_device_mesh, within, over, devices, process_is_granule=by_process
        )
        try:
            return make()
        except NotImplementedError:
            return make(allow_split_physical_axes=True)
    if set(counts.values()) != {1}:
        raise UserError(
            f"mesh.slices={slices}: the devices are of {counts['slice_index']} slices and {counts['process_index']} "
            "processes; give one of these numbers"
        )
    return np.array(devices, dtype=object).reshape(sizes)


def sampling_mesh(mesh: MeshConfig) -> MeshConfig:
    """The mesh to sample on: copies of the model, each split as `mesh.tensor` says; `data` and `fsdp` are
    training's."""
    return MeshConfig(data=1 if mesh.tensor == -1 else -1, tensor=mesh.tensor, rules=mesh.rules)


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Where a run's arrays lie: a mesh and the rules that split arrays over it.

    An abstract mesh has no devices, only their kind: programs are lowered for it.
    """

    mesh: Mesh | AbstractMesh
    rules: Rules

    @classmethod
    def of(cls, config: MeshConfig, batch_size: int, accumulate: int = 1) -> "MeshLayout":
        """All devices of all processes; raises `UserError` as `make_mesh` and `with_changes` do."""
        return cls(make_mesh(config, batch_size, accumulate=accumulate), with_changes(config.rules))

    @property
    def replicated(self) -> NamedSharding:
        """On every device in full."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Split along the first axis."""
        return NamedSharding(self.mesh, PartitionSpec(self.rules["batch"]))

    @property
    def batch_shards(self) -> int:
        """How many parts a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules["batch"])

    @property
    def platform(self) -> str:
        """ "cpu", "gpu", "cuda" or "tpu", of devices that need not be here."""
        device = self.mesh.abstract_device if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat[0]
        return device.platform if device else jax.default_backend()

    def state_shardings(self, state: Any, parameters: ParameterAxes) -> Any:
        """Of every array of a state, or of parameters alone; see `shardings`."""
        return shardings(state, parameters, self.mesh, self.rules)

    def check_divides(self, sizes: Mapping[str, int]) -> None:
        """Raises `UserError` unless the rules split logical axes of these sizes evenly."""
        for axis, size in sizes.items():
            parts = int(np.prod([self.mesh.shape[name] for name in self.rules.get(axis, ())]))
            if size % parts:
                raise UserError(f"mesh: {axis} is {size}, which {'*'.join(self.rules[axis])}={parts} does not divide")

    def put_padded(self, rows: Any) -> Any:
        """Host arrays (B, ...), the same in every process, split along B; the last row repeats until that is even."""

        def fill(array: Any) -> np.ndarray:
            array = np.asarray(array)
            more = -len(array) % self.batch_shards
            return np.pad(array, [(0, more)] + [(0, 0)] * (array.ndim - 1), "edge")

        return put_global(jax.tree.map(fill, rows), self.batch)

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Within it, what is traced lays out its activations by the rules."""
        mesh = self.mesh
        within = jax.sharding.use_abstract_mesh(mesh) if isinstance(mesh, AbstractMesh) else jax.set_mesh(mesh)
        with within, nn.logical_axis_rules(tuple(self.rules.items())):
            yield


def data_parallel_layout() -> MeshLayout | None:
    """A mesh on which every device has whole weights and shares batches with the others; None for a single device."""
    return MeshLayout(make_mesh(MeshConfig(), 0), with_changes(())) if len(jax.devices()) > 1 else None


def activate(layout: MeshLayout | None) -> contextlib.AbstractContextManager[None]:
    """`layout.activate()`, or nothing where there is no mesh."""
    return layout.activate() if layout else contextlib.nullcontext()


def local_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """Which rows of a global batch this process's devices hold, ascending."""
    slices = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index]
    return sorted({row for rows in slices for row in range(batch_size)[rows]})


def make_global_batch(sharding: NamedSharding, batch: Any, batch_size: int) -> Any:
    """A global batch (a tree of arrays) of which this process gives its `local_rows`; a global array stays as it is."""

    def join(rows: np.ndarray | jax.Array) -> jax.Array:
        if isinstance(rows, jax.Array):
            return rows
        return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

    return jax.tree.map(join, batch)


def put_global(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same in every process, as global arrays laid out by `shardings` (one, or a tree of them)."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def gather_to_host(tree: Any) -> Any:
    """Global arrays as whole host arrays in every process; every process must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    gathered = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(leaf.sharding.mesh, PartitionSpec())), tree)
    return jax.device_get(gathered)


Result = TypeVar("Result")


def first_process_first(make: Callable[[], Result]) -> Result:
    """`make()` in every process, in the first one before the others, so that these find the files that it writes."""
    if jax.process_index() == 0:
        make()
    multihost_utils.sync_global_devices("made by the first process")
    return make()
