"""Several processes, one job: JAX's own multi-controller runtime."""

import os
import re
import traceback

import jax
from jax.distributed import initialize

from hart_jax.errors import UserError, missing_device

_OF_INITIALIZE = initialize.__module__
_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Joins the other processes of this job, if there are any; call it before anything asks for devices.

    The job is described by $JAX_COORDINATOR_ADDRESS (host:port of process 0), $JAX_NUM_PROCESSES and $JAX_PROCESS_ID,
    or by a cluster that JAX knows (TPU pods, GKE, SLURM, Open MPI). Without either, this process is alone.

    Several processes on CPUs take no compiled program from JAX's cache on disk.

    Raises:
      UserError: only some of the three variables are set, their values are no numbers or the address has no port; or
        $JAX_PLATFORMS asks for a device that is not there.
    """
    _initialize()
    check_devices()
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
        if not re.fullmatch(r".+:[0-9]+", address):
            raise UserError(f"$JAX_COORDINATOR_ADDRESS={address}: needs host:port of process 0")
        if not (re.fullmatch("[0-9]+", count) and re.fullmatch("[0-9]+", index) and int(index) < int(count)):
            raise UserError(f"$JAX_NUM_PROCESSES={count}, $JAX_PROCESS_ID={index}: need numbers, the second smaller")
        initialize(address, int(count), int(index))
        return
    try:
        initialize()
    except ValueError as error:
        # Of JAX's own checks and not of a cluster's: no cluster was found.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") != _OF_INITIALIZE:
            raise


def check_devices() -> None:
    """Raises `UserError` where $JAX_PLATFORMS asks for a device that JAX does not find."""
    if sentence := missing_device():
        raise UserError(sentence)
