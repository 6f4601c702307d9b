"""Reading checkpoints: damaged ones are set aside, passing errors tried again, processes agree."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.checkpoints import restoring
from hart_jax.checkpoints.orbax import Checkpoints, load_params
from hart_jax.errors import UserError
from tests.checkpoints.states import CONFIG, bits, damage, make_iterator, make_state, save_steps
from tests.train_runs import ROOT, loopback_job, quick_environment


@pytest.mark.parametrize("how", ["truncated", "metadata lost", "state lost", "empty"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capfd, how):
    save_steps(tmp_path, range(1, 4))
    damage(tmp_path / "checkpoints" / "3", how)
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, restored, _ = checkpoints.restore(make_state())
        assert (step, bits(restored)) == (2, bits(make_state(2)))
        checkpoints.save(3, make_state(3))
    out = capfd.readouterr().out
    assert "checkpoints/3 cannot be read" in out and "tensorstore_spec" not in out
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 3
    assert (tmp_path / "checkpoints" / "3.unreadable").exists()


def test_whichever_file_is_torn_nothing_wrong_is_restored(tmp_path):
    whole = tmp_path / "whole"
    with Checkpoints(whole, CONFIG) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), make_iterator(), log=[step])
    files = [path.relative_to(whole) for path in (whole / "checkpoints" / "2").rglob("*") if path.is_file()]
    found = {}
    for number, file in enumerate(files):
        torn = tmp_path / str(number)
        shutil.copytree(whole, torn)
        os.truncate(torn / file, (torn / file).stat().st_size // 2)
        with Checkpoints(torn, CONFIG) as checkpoints:
            step, state, log = checkpoints.restore(make_state(), make_iterator())
        assert bits(state) == bits(make_state(step)) and log == [step]
        found[file] = step
    # Some files do not matter; those with the arrays do.
    assert {1, 2} == set(found.values())
    assert all(
        step == 1 for file, step in found.items() if file.parent.name == "d" and file.parent.parent.name == "state"
    )


@pytest.mark.parametrize("item", ["state", "data", "log", "digests"])
def test_an_item_that_is_readable_but_not_what_was_saved_counts_as_damaged(tmp_path, capfd, item):
    """What a flipped bit may do that no format notices."""
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        iterator = make_iterator()
        for step in (1, 2, 3):
            next(iterator)
            checkpoints.save(step, make_state(step), iterator, log=[step])
    shutil.rmtree(tmp_path / "checkpoints" / "3" / item)
    shutil.copytree(tmp_path / "checkpoints" / "1" / item, tmp_path / "checkpoints" / "3" / item)
    if item in ("state", "digests"):
        assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, state, log = checkpoints.restore(make_state(), make_iterator())
    assert (step, bits(state), log) == (2, bits(make_state(2)), [2])
    assert "not what was saved, by its digest" in capfd.readouterr().out
    assert (tmp_path / "checkpoints" / "3.unreadable").exists()


def test_flipped_bits_in_the_arrays_are_never_restored(tmp_path):
    save_steps(tmp_path / "whole", range(1, 3))
    [arrays] = (tmp_path / "whole" / "checkpoints" / "2" / "state" / "d").iterdir()
    raw = arrays.read_bytes()
    # At the end of the file: the arrays' bytes, before the table of contents.
    for number, place in enumerate(np.linspace(0, len(raw) - 1, 6, dtype=int)):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        flipped = bytearray(raw)
        flipped[place] ^= 4
        (tmp_path / str(number) / arrays.relative_to(tmp_path / "whole")).write_bytes(bytes(flipped))
        with Checkpoints(tmp_path / str(number), CONFIG) as checkpoints:
            step, state, _ = checkpoints.restore(make_state())
        assert bits(state) == bits(make_state(step))


def test_a_checkpoint_of_a_version_without_digests_opens(tmp_path):
    save_steps(tmp_path, range(1, 3))
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "digests")
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        step, state, _ = checkpoints.restore(make_state())
    assert (step, bits(state)) == (2, bits(make_state(2)))


def failing_reads(monkeypatch, error: Exception, times: int) -> list[Exception]:
    """The next `times` reads of arrays raise `error`, wrapped as Orbax does; gives what was raised."""
    raised: list[Exception] = []
    for name in ("load", "load_checkpointables"):
        read = getattr(restoring.ocp, name)

        def failing(*arguments, read=read):
            if len(raised) < times:
                raised.append(error)
                raise KeyError("Failed to load checkpointable: state") from error
            return read(*arguments)

        monkeypatch.setattr(restoring.ocp, name, failing)
    monkeypatch.setattr(restoring, "RETRY_SECONDS", (0, 0))
    return raised


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("UNAVAILABLE: Error reading a file: the server is away"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_an_error_of_the_reading_is_tried_again_and_renames_nothing(tmp_path, monkeypatch, error):
    save_steps(tmp_path, range(1, 3))
    failing_reads(monkeypatch, error, times=2)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        assert checkpoints.restore(make_state()).step == 2
    failing_reads(monkeypatch, error, times=2)
    assert bits(load_params(tmp_path)) == bits(make_state(2).ema)
    raised = failing_reads(monkeypatch, error, times=100)
    with (
        Checkpoints(tmp_path, CONFIG) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/2 cannot be read now.*nothing was changed"),
    ):
        checkpoints.restore(make_state())
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read now"):
        load_params(tmp_path)
    assert len(raised) == 6
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


@pytest.mark.parametrize(
    "error",
    [MemoryError("out"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), ZeroDivisionError("a bug")],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_the_file_is_raised_as_it_is(tmp_path, monkeypatch, error):
    save_steps(tmp_path, range(1, 3))
    raised = failing_reads(monkeypatch, error, times=100)
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(KeyError) as found:
        checkpoints.restore(make_state())
    assert found.value.__cause__ is error
    assert len(raised) == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_other_arrays_than_the_run_has_are_an_error_and_rename_nothing(tmp_path):
    save_steps(tmp_path, range(1, 3))
    wider = {**make_state().params, "awkward": jnp.zeros(7)}
    for other in (make_state().replace(params=wider), make_state().replace(params={**wider, "new": jnp.zeros(3)})):
        with (
            Checkpoints(tmp_path, CONFIG) as checkpoints,
            pytest.raises(UserError, match=r"checkpoints/2 holds other arrays than this run has"),
        ):
            checkpoints.restore(other)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


RESTORING_TOGETHER = """
    import errno, os, sys
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from hart_jax.checkpoints import restoring
    from hart_jax.checkpoints.orbax import Checkpoints
    from hart_jax.errors import UserError
    from hart_jax.parallel.launch import join_processes

    join_processes()
    mesh = jax.make_mesh((2,), ("data",))
    restoring.RETRY_SECONDS = (0,)

    def state(step):
        places = {"parts": NamedSharding(mesh, PartitionSpec("data")), "whole": NamedSharding(mesh, PartitionSpec())}
        whole = np.full((4, 3), step, np.float32)
        return {name: jax.make_array_from_callback(whole.shape, at, lambda i: whole[i]) for name, at in places.items()}

    with Checkpoints(sys.argv[1], {"a": 1}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), log=[step])

    read, left = restoring.ocp.load_checkpointables, [0, None]

    def failing(path, items):
        if jax.process_index() == 1 and path.name == "2" and left[0]:
            left[0] -= 1
            raise left[1]
        return read(path, items)

    restoring.ocp.load_checkpointables = failing
    for case in (
        (9, OSError(errno.EIO, "Input/output error")),
        (9, RuntimeError("RESOURCE_EXHAUSTED: Out of memory")),
        (1, OSError(errno.EIO, "Input/output error")),
        (1, FileNotFoundError("no such file")),
    ):
        left[:] = case
        with Checkpoints(sys.argv[1], {"a": 1}) as checkpoints:
            try:
                restored = checkpoints.restore(jax.eval_shape(lambda: state(0)) | state(0))
                values = {float(x) for leaf in restored.state.values() for x in leaf.addressable_data(0).ravel()}
                found = f"step {restored.step} {values} {restored.log}"
            except (UserError, RuntimeError) as error:
                found = type(error).__name__
        print("found", found, sorted(os.listdir(sys.argv[1] + "/checkpoints")), flush=True)
"""


def test_processes_restore_the_same_checkpoint_though_one_cannot_read_the_newest(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(RESTORING_TOGETHER), str(tmp_path)]
    job = [
        subprocess.Popen(command, cwd=ROOT, env={**quick_environment(), **meeting}, stdout=subprocess.PIPE, text=True)
        for meeting in loopback_job(2)
    ]
    first, second = (
        [line for line in process.communicate(timeout=600)[0].splitlines() if line.startswith("found")]
        for process in job
    )
    both = ["found step 2 {2.0} [2] ['1', '2']", "found step 1 {1.0} [1] ['1', '2.unreadable']"]
    assert first == ["found TryLater ['1', '2']"] * 2 + both
    assert second == ["found TryLater ['1', '2']", "found RuntimeError ['1', '2']", *both]


def test_no_readable_checkpoint_is_an_error_and_nothing_is_moved(tmp_path):
    save_steps(tmp_path, range(1, 3))
    for step in ("1", "2"):
        damage(tmp_path / "checkpoints" / step, "state lost")
    with Checkpoints(tmp_path, CONFIG) as checkpoints, pytest.raises(UserError, match=r"\[2, 1\]"):
        checkpoints.restore(make_state())
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]
    with pytest.raises(UserError, match="can be read"):
        load_params(tmp_path)
