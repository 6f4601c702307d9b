"""Meshes: sizes that do not fit are refused before anything is compiled; rows of this process."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hart_jax.config import MeshConfig
from hart_jax.errors import UserError
from hart_jax.parallel.launch import join_processes
from hart_jax.parallel.mesh import Placement, local_rows, make_mesh, on_host, on_mesh, to_global
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


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_impossible_sizes(sizes):
    with pytest.raises(UserError, match="mesh"):
        MeshConfig(**sizes)


def test_one_process_holds_every_row():
    placement = Placement.of(MeshConfig(), 8)
    assert local_rows(placement.batch, 8) == list(range(8))
    batch = {"a": np.arange(8), "b": (np.ones((8, 3)),)}
    whole = to_global(placement.batch, batch, 8)
    jax.tree.map(np.testing.assert_array_equal, on_host(whole), batch)
    jax.tree.map(np.testing.assert_array_equal, on_host(on_mesh(batch, placement.whole)), batch)


def test_heads_that_the_mesh_does_not_divide():
    placement = Placement(AbstractMesh((1, 1, 4), AXES), RULES)
    placement.check_divides({"heads": 8, "embed": 7})
    with pytest.raises(UserError, match=r"heads is 6, which tensor=4 does not divide"):
        placement.check_divides({"heads": 6})


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
