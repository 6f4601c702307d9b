"""One run at a time writes into a folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from hart_jax.errors import UserError
from hart_jax.io.ownership import OWNER_FILE, owned
from tests.train_runs import ROOT, run_to_end, write_tokenizer_config

HOLD = """
import sys
from hart_jax.io.ownership import owned
with owned(sys.argv[1], "a rival"):
    print("held", flush=True)
    input()
"""


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    folder = tmp_path / "new"
    with owned(folder, "a training run"):
        with pytest.raises(UserError) as refused, owned(folder, "another"):
            pytest.fail("two runs own the folder")
        message = str(refused.value)
        assert f"{folder}: belongs to a training run on host {socket.gethostname()}, process {os.getpid()}" in message
        (folder / "work").touch()
    assert [path.name for path in folder.iterdir()] == ["work"]
    with owned(folder, "another"):
        assert (folder / OWNER_FILE).exists()


def test_a_folder_that_nothing_was_written_to_goes_again(tmp_path):
    with pytest.raises(UserError, match="wrong"), owned(tmp_path / "new", "a run"):
        raise UserError("wrong")
    assert not (tmp_path / "new").exists()


def test_a_killed_owner_stops_nobody(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rival:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"a rival on host .*, process {rival.pid} "), owned(tmp_path, "ours"):
            pytest.fail("two runs own the folder")
        rival.kill()
    assert (tmp_path / OWNER_FILE).exists()
    with owned(tmp_path, "ours"):
        pass


def test_a_file_removed_while_it_was_being_locked_is_made_anew(tmp_path, monkeypatch):
    first = owned(tmp_path, "first")
    first.__enter__()
    lock, calls = fcntl.flock, []

    def release_before(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            first.__exit__(None, None, None)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", release_before)
    with owned(tmp_path, "second"):
        assert len(calls) == 2
        with pytest.raises(UserError, match="belongs to second"), owned(tmp_path, "third"):
            pytest.fail("two runs own the folder")


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with owned(tmp_path, "a run"):
        assert "has no locks (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, code):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fails)
    with pytest.raises(UserError, match=f"cannot be written to .{os.strerror(code)}"), owned(tmp_path, "a run"):
        pytest.fail("owned all the same")


@pytest.mark.parametrize("name", ["file/run", "x" * 300], ids=["below a file", "a name too long"])
def test_a_folder_that_cannot_be(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"), owned(tmp_path / name, "a run"):
        pytest.fail("owned all the same")


def test_no_process_of_a_job_trains_where_another_run_does(tmp_path):
    """The process that asks for no lock ends too, before they have touched the folder."""
    arguments = (f"--config={write_tokenizer_config(tmp_path)}", f"--workdir={tmp_path / 'run'}")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with owned(tmp_path / "run", "a training run"):
        code, _, err = run_to_end(*arguments, processes=2)
        assert code == 75
        assert err.count(f"belongs to a training run on host {socket.gethostname()}, process {os.getpid()}") == 2
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [OWNER_FILE, "checkpoints"]
