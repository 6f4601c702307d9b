"""Files and folders are there whole or not at all, whatever stops their making."""

from pathlib import Path

import pytest

from hart_jax.io.files import atomic_file, atomic_folder, remove_unfinished, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_file_is_the_new_one_or_the_one_before(tmp_path: Path, error):
    path = tmp_path / "file"
    write_text(path, "before")
    try:
        with atomic_file(path) as temporary:
            temporary.write_text("after")
            assert path.read_text() == "before" and temporary.parent == tmp_path
            if error:
                raise error
    except (KeyboardInterrupt, OSError):
        assert error
    assert path.read_text() == ("before" if error else "after")
    assert names(tmp_path) == ["file"]


def test_a_folder_has_its_name_when_all_is_there(tmp_path: Path):
    with atomic_folder(tmp_path / "new" / "folder") as folder:
        write_json(folder / "part" / "a.json", {"b": 1})
        assert not (tmp_path / "new" / "folder").exists()
    assert names(tmp_path / "new") == ["folder", "folder/part", "folder/part/a.json"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "none") as folder:
        write_text(folder / "a", "x")
        raise KeyboardInterrupt
    # What came there meanwhile stays.
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "new" / "folder") as folder:
        write_text(folder / "other", "x")
    assert names(tmp_path) == ["new", "new/folder", "new/folder/part", "new/folder/part/a.json"]


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path: Path):
    for name in (".a.png.123", ".b.png.123", ".a.png.owner", "a.png", ".a.png"):
        write_text(tmp_path / name, "x")
    remove_unfinished(tmp_path, {"a.png", "c.png"})
    assert names(tmp_path) == [".a.png", ".a.png.owner", ".b.png.123", "a.png"]
