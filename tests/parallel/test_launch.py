"""Processes that join."""

import subprocess
import sys

import pytest

from hart_jax.errors import UserError
from hart_jax.parallel import launch
from tests.train_runs import ROOT, loopback_job, quick_environment

JOIN = """
import jax
from hart_jax.parallel.launch import join_processes
join_processes()
print(jax.process_count(), jax.device_count(), jax.config.jax_enable_compilation_cache)
"""


def test_processes_on_cpus_take_no_program_from_the_cache():
    """Two that do wait for each other for ever, as soon as they split a loop's products."""
    command = [sys.executable, "-c", JOIN]
    for processes, expected in ((1, "1 1 True"), (2, "2 2 False")):
        job = [
            subprocess.Popen(
                command, cwd=ROOT, env={**quick_environment(), **meeting}, stdout=subprocess.PIPE, text=True
            )
            for meeting in loopback_job(processes)
        ]
        assert [process.communicate()[0].strip() for process in job] == [expected] * processes


@pytest.mark.parametrize(
    ("address", "count", "named"),
    [("host", "2", "JAX_COORDINATOR_ADDRESS=host: needs host:port"), ("host:1", "\u00b2", "JAX_NUM_PROCESSES=\u00b2")],
)
def test_a_job_that_is_described_wrongly(monkeypatch, address, count, named):
    for name, value in zip(launch._EXPLICIT, (address, count, "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named):
        launch.join_processes()


def test_a_cluster_that_fails_is_not_taken_for_none(monkeypatch):
    def fails():
        raise ValueError("the cluster's coordinator_address is wrong")

    monkeypatch.setattr(launch, "initialize", fails)
    with pytest.raises(ValueError, match="cluster's"):
        launch.join_processes()
