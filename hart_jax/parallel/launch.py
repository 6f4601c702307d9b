"""Several processes, one job: JAX's own multi-controller runtime."""

import os

import jax

from hart_jax.errors import UserError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Joins the other processes of this job, if there are any; call it before anything asks for devices.

    The job is described by $JAX_COORDINATOR_ADDRESS (host:port of process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID,
    or by a cluster that JAX knows (TPU pods, GKE, SLURM, Open MPI). Without either, this process is alone.

    Several processes on CPUs take no compiled program from JAX's cache on disk.

    Raises:
      UserError: only some of the three variables are set, or their values are no numbers.
    """
    _initialize()
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # A CPU program read from there has lost the order between collectives in a loop and those outside it (XLA
        # restores the order of each sequence alone): processes that take them in different orders wait for ever.
        jax.config.update("jax_enable_compilation_cache", False)


def _initialize() -> None:
    given = [name for name in _EXPLICIT if name in os.environ]
    if given:
        missing = [name for name in _EXPLICIT if name not in os.environ]
        if missing:
            raise UserError(f"${given[0]} is set but ${missing[0]} is not: several processes need all of {_EXPLICIT}")
        address, count, index = (os.environ[name] for name in _EXPLICIT)
        if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
            raise UserError(f"$JAX_NUM_PROCESSES={count}, $JAX_PROCESS_ID={index}: need numbers, the second smaller")
        jax.distributed.initialize(address, int(count), int(index))
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        # No cluster was found.
        if "coordinator_address" not in str(error):
            raise
