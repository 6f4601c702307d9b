"""Signals end a run after a step, several processes after the same one; a second signal does not wait for it."""

import signal
import socket
import subprocess
import sys
import textwrap

import pytest

ASKING = """
    import sys, time
    import jax
    from hart_jax.training.stop import StopSignals

    address, process = sys.argv[1:]
    if address:
        jax.distributed.initialize(address, 2, int(process))
    with StopSignals() as stop:
        for step in range(1, 1_000_000):
            if stop.due(step):
                print("stops at", step, stop.received.name, flush=True)
                break
            print("step", step, flush=True)
            time.sleep(0.01)
"""
DEAF = """
    import time
    from hart_jax.training.stop import StopSignals

    with StopSignals() as stop:
        print("step", flush=True)
        while True:
            if stop.received:
                print("received", flush=True)
                stop.received = None
            time.sleep(0.01)
"""


def start(script: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("step")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_stops_after_its_step(number):
    process = start(ASKING, "", "")
    process.send_signal(number)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    assert out.splitlines()[-1].split()[-1] == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_after_the_same_step(number):
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(ASKING), address]
    processes = [subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, text=True) for index in range(2)]
    assert all(process.stdout.readline().startswith("step") for process in processes)
    processes[1].send_signal(number)
    stops = [process.communicate(timeout=600)[0].splitlines()[-1].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert stops[0][:2] == stops[1][:2] == ["stops", "at"] and stops[0][2] == stops[1][2]
    assert [stop[3] for stop in stops] == ["SIGTERM", number.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    with start(DEAF) as process:
        process.send_signal(number)
        assert process.stdout.readline() == "received\n"
        process.send_signal(number)
        process.communicate(timeout=600)
    assert process.returncode == -number
