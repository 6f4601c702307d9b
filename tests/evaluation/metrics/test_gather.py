"""Arrays of one process and of two that meet over loopback; run as a program this file is one of the two."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from hart_jax.evaluation.metrics import gather as gather_module
from hart_jax.evaluation.metrics.gather import gather_rows
from hart_jax.parallel.launch import join_processes
from tests.train_runs import loopback_job, quick_environment

ROOT = Path(__file__).parents[3]
COUNT, WIDTH = 11, 4
LIMIT_SECONDS = 600
# What each of two processes has of the images, in its order.
SHARES = {
    "uneven": ([7, 0, 3, 10, 1, 2, 9, 8], [5, 4, 6]),
    "all in one": ([], [*range(COUNT)][::-1]),
}


def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(COUNT, WIDTH)) + 100


def bits() -> np.ndarray:
    """Doubles that no float32 holds, and the unusual ones: subnormal, -0, infinite, and not a number with a payload."""
    rows = 1 + np.arange(COUNT * 2 * 3).reshape(COUNT, 2, 3) * np.finfo(np.float64).eps
    rows[3, 0] = 5e-324, -0.0, -np.inf
    rows.view(np.uint64)[4, 1, 1] = 0x7FF8_0000_0000_1234
    return rows


def whole() -> dict[str, np.ndarray]:
    return {
        "float64": bits(),
        "float32": features().astype(np.float32),
        "int64": np.arange(COUNT) + 2**40,
        "uint8": np.arange(COUNT * 3, dtype=np.uint8).reshape(COUNT, 3),
    }


def work(out: Path) -> None:
    """What one of the processes does."""
    join_processes()
    assert jax.process_count() == 2
    found = {}
    for share, orders in SHARES.items():
        order = np.array(orders[jax.process_index()], np.int64)
        for name, rows in whole().items():
            found[f"{share} {name}"] = gather_rows(rows[order], order)
    none = np.zeros(0, np.int64)
    found["none"] = gather_rows(np.zeros((0, 3)), none)
    mine = np.arange(2) + jax.process_index()
    with pytest.raises(ValueError, match="each of 0 to 3 once"):
        gather_rows(np.zeros((2, 1)), mine)
    with pytest.raises(ValueError, match="different bytes or types"):
        gather_rows(np.zeros((2, 1 + jax.process_index())), mine)
    np.savez(out / f"{jax.process_index()}.npz", **found)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("gathered")
    command = [sys.executable, "-m", "tests.evaluation.metrics.test_gather", str(out)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**quick_environment(), **meeting}, stderr=subprocess.PIPE, text=True)
        for meeting in loopback_job(2)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return [dict(np.load(out / f"{index}.npz")) for index in range(2)]


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_have_what_one_has_bit_for_bit(of_two, share):
    for found in of_two:
        for name, rows in whole().items():
            assert_same_bits(found[f"{share} {name}"], rows)
        assert found["none"].shape == (0, 3)


def test_one_process_puts_its_rows_in_order():
    order = np.random.default_rng(0).permutation(COUNT)
    assert_same_bits(gather_rows(bits()[order], order), bits())


def test_positions_that_do_not_fit():
    with pytest.raises(ValueError, match="one for each row"):
        gather_rows(np.zeros((3, 2)), np.arange(2))
    for order in ([0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match="each of 0 to 2 once"):
            gather_rows(np.zeros((3, 2)), np.array(order))


if __name__ == "__main__":
    work(Path(sys.argv[1]))


def test_more_than_two_gibibytes_of_rows(monkeypatch):
    """Another process has as many as a reference of ImageNet's size; what nobody writes takes no memory."""
    asked = []

    def gather(array):
        asked.append(array.shape)
        if len(asked) == 2:
            raise StopIteration
        return np.stack([array, [300_000, *array[1:]]]).astype(np.int32)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(gather_module.multihost_utils, "process_allgather", gather)
    with pytest.raises(StopIteration):
        gather_rows(np.zeros((1, 2048), np.float32), np.arange(1))
    assert asked[1] == (300_000 * 2048 * 4,)
