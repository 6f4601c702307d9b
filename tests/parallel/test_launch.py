"""Processes that join."""

import subprocess
import sys

from tests.train_runs import ROOT, job_environments

JOIN = """
import jax
from hart_jax.parallel.launch import join_processes
join_processes()
print(jax.process_count(), jax.device_count(), jax.config.jax_enable_compilation_cache)
"""


def test_processes_on_cpus_take_no_program_from_the_cache():
    """Two that do wait for each other for ever, as soon as they split a loop's products."""
    for processes, expected in ((1, "1 1 True"), (2, "2 2 False")):
        job = [
            subprocess.Popen([sys.executable, "-c", JOIN], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
            for env in job_environments(processes)
        ]
        assert [process.communicate()[0].strip() for process in job] == [expected] * processes
