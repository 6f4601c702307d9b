"""Processes that join."""

import subprocess
import sys

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
