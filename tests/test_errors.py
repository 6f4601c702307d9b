"""What the user can fix is one sentence and exit code 2; a fault of the program keeps its traceback."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hart_jax.config import read_experiment
from hart_jax.errors import UserError, run_cli
from hart_jax.io import cache_dir
from hart_jax.io.files import atomic_file, check_can_write, check_readable, write_text
from hart_jax.io.tensor_files import open_tensors

ROOT = Path(__file__).parent.parent


def ended(main, capsys) -> str:
    """The one line that a command's main function ends with."""
    with pytest.raises(SystemExit) as exit:
        run_cli(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith("error: ")
    return line


def raising(error: Exception):
    def main():
        raise error

    return main


def test_errors_of_the_operating_system_name_the_path_and_the_fix(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    cases = {
        "a file lies where a folder should be": lambda: (tmp_path / "file" / "x").write_text("x"),
        "give a shorter name": lambda: (tmp_path / ("x" * 300)).exists(),
        "give the name of a file": lambda: tmp_path.read_text(),
        "check the path": lambda: (tmp_path / "none").read_text(),
        "change its owner or mode": raising(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "mine"))),
        "give a path that can be written to": raising(OSError(errno.EROFS, "Read-only file system", str(tmp_path))),
        "cannot be copied": lambda: shutil.copytree(tmp_path, tmp_path / "file" / "copy"),
    }
    for fix, main in cases.items():
        line = ended(main, capsys)
        assert str(tmp_path) in line and (fix in line or fix == "cannot be copied"), line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named_by_the_file_that_was_to_be_written(tmp_path, capsys):
    def main():
        with atomic_file(tmp_path / "results.json") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x" * 100_000)

    line = ended(main, capsys)
    assert f"{tmp_path / 'results.json'}: No space left on device; free some space" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), OSError("x"), AssertionError(), RuntimeError("x")])
def test_faults_of_the_program_keep_their_traceback(error, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(type(error)):
        run_cli(raising(error))


def test_a_device_that_is_not_there_is_one_error():
    code = "from hart_jax.errors import run_cli; import jax; run_cli(lambda: jax.numpy.zeros(3))"
    for platform in ("cuda", "nonsense"):
        environment = {**os.environ, "JAX_PLATFORMS": platform}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("error")]
        assert run.returncode == 2 and f"JAX_PLATFORMS={platform}: JAX finds no such device" in line
        assert "Traceback" not in run.stderr


def test_without_a_home_there_is_no_cache_and_one_warning(tmp_path, monkeypatch, capsys):
    cache_dir._warn_once.cache_clear()
    for name in ("HART_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").write_text("not a folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir.cache_folder() is None and cache_dir.cache_folder() is None
    assert capsys.readouterr().err.count("warning: nothing is kept for the next start") == 1

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir.cache_folder() is None
    monkeypatch.setenv("HART_CACHE_DIR", str(tmp_path / "cache"))
    assert cache_dir.cache_folder() == tmp_path / "cache"


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    check_can_write(tmp_path / "new" / "newer")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        check_can_write(tmp_path / "file" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "model.safetensors").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        open_tensors(tmp_path / "model.safetensors")


def test_files_that_do_not_hold_what_they_should(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"model\.safetensors: a git-LFS pointer"):
        check_readable(pointer)
    with pytest.raises(UserError, match="none: no such weight file"):
        check_readable(tmp_path / "none", "weight file")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        check_readable(tmp_path)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(os, "replace", lambda source, target: events.append(target))
    write_text(tmp_path / "notes.txt", "x")
    assert [Path(event).name.startswith(".notes.txt") for event in events] == [True, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [("def get_config():\n    return 1 / 0\n", "line 2 raises ZeroDivisionError"), ("def (", "line 1 raises Syntax")],
)
def test_a_config_file_that_raises_is_named(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.py: {said}"):
        read_experiment(path)
    command = [sys.executable, str(ROOT / "sample.py"), f"--config={path}", "--prompt=x"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith(f"error: --config={path}: {said}")
