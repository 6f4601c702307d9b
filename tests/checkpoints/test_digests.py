"""Digests of arrays see every flipped bit, and are the same on devices, parts of them, and the host."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints.digests import array_digests, check_digests, host_digest
from tests.train_runs import ROOT, loopback_job, quick_environment

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(3, 5, 7)).astype(np.float32),
    "bfloat16": np.asarray(jnp.asarray(RNG.normal(size=(33,)), jnp.bfloat16)),
    "int8": RNG.integers(-128, 127, (4, 9), np.int8),
    "bool": RNG.integers(0, 2, 17).astype(bool),
    "scalar": np.int32(-7),
    "odd values": np.asarray([np.nan, np.inf, -0.0, 1e-42], np.float32),
    "none": np.zeros((0, 3), np.float32),
    "longer than the host takes at a time": RNG.normal(size=(3, 100_003)).astype(np.float32),
}


def test_devices_and_the_host_agree():
    found = array_digests({"params": ARRAYS})
    assert found == {f"params.{name}": host_digest(np.asarray(array)) for name, array in ARRAYS.items()}


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_every_flipped_bit_is_seen(name):
    whole = host_digest(ARRAYS[name])
    raw = ARRAYS[name].tobytes()
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        array = np.frombuffer(bytes(flipped), ARRAYS[name].dtype).reshape(ARRAYS[name].shape)
        assert host_digest(array) != whole


def test_two_flips_and_exchanged_elements_are_seen():
    array = RNG.normal(size=200).astype(np.float32)
    whole, seen = host_digest(array), set()
    for index in range(1, 200):
        signs, exchanged = array.copy(), array.copy()
        signs[[0, index]] *= -1
        exchanged[[0, index]] = exchanged[[index, 0]]
        seen |= {host_digest(signs), host_digest(exchanged)}
    assert len(seen) == 2 * 199 and whole not in seen


def test_an_array_that_changed_is_named():
    with pytest.raises(ValueError, match=r"array ema\.b: not what was saved"):
        check_digests({"ema.a": 1, "ema.b": 2}, {"ema.a": 1, "ema.b": 3})


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from hart_jax.checkpoints.digests import array_digests, host_digest
from hart_jax.parallel.launch import join_processes

join_processes()
array = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
mesh = jax.make_mesh((2, 2), ("data", "fsdp"))

def put(spec, wrong=False):
    def part(index):
        rows = array[index].copy()
        if wrong and jax.process_index() == 1:
            rows.reshape(-1)[:1] += 1
        return rows
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), part)

tree = {"parts": put(P(("data", "fsdp"))), "columns": put(P("fsdp", "data")), "rows": put(P("fsdp")), "whole": put(P())}
assert set(array_digests(tree, copies=True).values()) == {host_digest(array)}, array_digests(tree, copies=True)
damaged = {"rows": put(P("fsdp"), wrong=True)}
assert array_digests(damaged) == {"rows": host_digest(array)}
try:
    array_digests(damaged, copies=True)
except ValueError as error:
    print(error)
"""


def test_parts_over_two_processes_and_a_copy_that_differs():
    command = [sys.executable, "-c", SHARDED]
    job = [
        subprocess.Popen(command, cwd=ROOT, env={**quick_environment(2), **meeting}, stdout=subprocess.PIPE, text=True)
        for meeting in loopback_job(2)
    ]
    said = "array rows: its copies on several devices differ"
    assert [process.communicate()[0].splitlines()[-1] for process in job] == [said, said]
