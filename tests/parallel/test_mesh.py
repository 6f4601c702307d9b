"""Meshes: sizes that do not fit are refused before anything is compiled; rows of this process."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from hart_jax.config import MeshConfig
from hart_jax.errors import UserError
from hart_jax.parallel.launch import join_processes
from hart_jax.parallel.mesh import MeshLayout, gather_to_host, local_rows, make_global_batch, make_mesh, put_global
from hart_jax.parallel.rules import AXES, RULES


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ({"data": 3}, 12, r"data=3, fsdp=1, tensor=1 does not multiply to the 8 devices"),
        ({"fsdp": 16}, 16, r"does not multiply to the 8 devices"),
        ({"data": -1, "tensor": 3}, 16, r"does not multiply to the 8 devices"),
        ({"data": 2, "fsdp": 4}, 12, r"train\.batch_size=12: must be a multiple of data\*fsdp=8"),
    ],
)
def test_sizes_that_do_not_fit(sizes, batch, message):
    with pytest.raises(UserError, match=message):
        make_mesh(MeshConfig(**sizes), batch, devices=[object()] * 8)


@dataclasses.dataclass(frozen=True)
class Device:
    """Like JAX's, as far as a mesh looks at it."""

    id: int
    slice_index: int = 0
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "one"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 4 // 2, self.id % 2, 0


# Eight devices in an order that mixes their slices, as JAX may list them.
MIXED = (5, 0, 6, 1, 7, 2, 4, 3)


@pytest.mark.parametrize(
    ("made", "slices"),
    [
        # TPUs say themselves how many slices there are.
        (lambda id: Device(id, slice_index=id // 4, platform="tpu", process_index=id // 2), 0),
        (lambda id: Device(id, slice_index=id // 4, process_index=id // 2), 2),
        (lambda id: Device(id, process_index=id // 4), 2),
    ],
)
def test_only_data_crosses_slices(made, slices):
    mesh = make_mesh(MeshConfig(fsdp=2, slices=slices), 8, [made(id) for id in MIXED])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    ids = np.vectorize(lambda device: device.id // 4)(mesh.devices)
    # The first half of `data` is the first slice, the other the second.
    np.testing.assert_array_equal(ids, np.repeat([0, 1], 4).reshape(4, 2, 1))


def test_devices_of_one_process_make_slices_in_order():
    devices = jax.devices("cpu") * 8
    mesh = make_mesh(MeshConfig(fsdp=2, slices=2), 8, devices[:8])
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1} and mesh.axis_types == (AxisType.Auto,) * 3


def test_gpus_of_several_hosts_are_one_slice_where_nothing_else_is_asked_for():
    devices = [Device(id, process_index=id // 4) for id in range(8)]
    assert dict(make_mesh(MeshConfig(fsdp=8), 8, devices).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=8), r"data=1, fsdp=8, tensor=1 over 2 slices: data must be a multiple"),
        (MeshConfig(data=1, tensor=-1), r"data=1, fsdp=1, tensor=8 over 2 slices: data must be a multiple"),
        (MeshConfig(slices=8), r"mesh\.slices=8: the devices are of 2 slices and 4 processes"),
    ],
)
def test_slices_that_the_mesh_does_not_fit(config, message):
    devices = [Device(id, slice_index=id // 4, process_index=id // 2, platform="tpu") for id in range(8)]
    with pytest.raises(UserError, match=message):
        make_mesh(config, 8, devices)


@pytest.mark.parametrize("sizes", [{"slices": -1}, {"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_impossible_sizes(sizes):
    with pytest.raises(UserError, match="mesh"):
        MeshConfig(**sizes)


def test_one_process_holds_every_row():
    layout = MeshLayout.of(MeshConfig(), 8)
    assert local_rows(layout.batch, 8) == list(range(8))
    batch = {"a": np.arange(8), "b": (np.ones((8, 3)),)}
    whole = make_global_batch(layout.batch, batch, 8)
    jax.tree.map(np.testing.assert_array_equal, gather_to_host(whole), batch)
    jax.tree.map(np.testing.assert_array_equal, gather_to_host(put_global(batch, layout.replicated)), batch)


def test_heads_that_the_mesh_does_not_divide():
    layout = MeshLayout(AbstractMesh((1, 1, 4), AXES), RULES)
    layout.check_divides({"heads": 8, "embed": 7})
    with pytest.raises(UserError, match=r"heads is 6, which tensor=4 does not divide"):
        layout.check_divides({"heads": 6})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, r"\$JAX_NUM_PROCESSES is not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, r"\$JAX_COORDINATOR_ADDRESS is not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "need numbers, the second smaller",
        ),
    ],
)
def test_jobs_described_wrongly(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        join_processes()
