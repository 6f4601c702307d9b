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
    from hart_jax.parallel.stop import StopSignals

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
    from hart_jax.parallel.stop import StopSignals

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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("step")
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_process_stops_after_its_step(number):
    process = start(ASKING, "", "")
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0
    assert out.splitlines()[-1].split()[-1] == number.name
    assert f"{number.name}: saving after this step" in err


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


DRAWING = """
    import os, signal, sys
    from pathlib import Path
    import jax, numpy as np
    from orbax.checkpoint import multihost
    from hart_jax.evaluation.generation import sample_images
    from hart_jax.config import HartExperiment
    from hart_jax.sampling.pipeline import SampleRequest, Sample

    address, index, out, number = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(index))
    store = multihost.get_jax_distributed_client()

    class Pipeline:
        def check(self, prompts):
            pass

        def batch_size(self, count, wanted):
            return 1

        def batches(self, batches, size):
            for place, batch in enumerate(batches):
                if place == 2 and index == "1":
                    os.kill(os.getpid(), int(number))
                # The other process samples on after it has been told.
                while place == 2 and index == "0" and not store.key_value_dir_get("hart_jax"):
                    pass
                yield [Sample(one.prompt, one.index, one.seed, np.zeros((2, 2, 3), np.uint8)) for one in batch]

    requests = [SampleRequest(f"a dog {place}", 0, 0) for place in range(30)]
    sample_images(Pipeline(), HartExperiment(), requests, [None] * 30, Path(out), 1, {}, "model")
    print("went on", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_that_sample_end_together_though_one_got_the_signal(tmp_path, number):
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(DRAWING), address]
    job = [
        subprocess.Popen([*command, str(index), str(tmp_path), str(int(number))], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in job]
    assert [process.returncode for process in job] == [128 + number] * 2
    assert not any("went on" in text for text in said)
    sampled = [int(path.name[:5]) for path in tmp_path.glob("*.png")]
    # The batch at work is finished.
    assert [number for number in sorted(sampled) if number % 2] == [1, 3, 5]
    assert sum(number % 2 == 0 for number in sampled) <= 3
