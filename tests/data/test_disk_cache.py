"""Tables on disk are whole or not there, whatever stops their making."""

from pathlib import Path

import numpy as np
import pytest

from hart_jax.data.disk_cache import fitting, new_cache, open_cache, read_column
from hart_jax.errors import UserError
from tests.data.conftest import file_size_limit


def write_table(folder: Path, rows: int = 7, limit: int = 10**9) -> None:
    with file_size_limit(limit), new_cache(folder, rows) as (new, write):
        for start in range(0, rows, 3):
            part = np.arange(start, min(start + 3, rows), dtype=np.float16)
            write(single=part, pair=np.stack([part, -part], 1).astype(np.int32))
        (new / "last").write_text("x" * 300)


def test_columns_are_what_was_written(tmp_path: Path):
    write_table(tmp_path / "table")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["last", "pair.npy", "single.npy", "table"]
    pair = read_column(tmp_path / "table" / "pair.npy", 7)
    np.testing.assert_array_equal(pair, np.arange(7)[:, None] * [1, -1])
    assert pair.dtype == np.int32
    assert read_column(tmp_path / "table" / "single.npy", 7, in_memory=True).dtype == np.float16
    with pytest.raises(ValueError, match="not 8 rows"):
        read_column(tmp_path / "table" / "pair.npy", 8)


@pytest.mark.parametrize("limit", [60, 150, 299])
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, limit: int):
    with pytest.raises(UserError, match=r"table: cannot be written \(File too large\)"):
        write_table(tmp_path / "table", limit=limit)
    assert not list(tmp_path.iterdir())


def test_files_have_no_holes(tmp_path: Path):
    """What a memory map writes into is a hole before; a full disk is a signal then."""
    with new_cache(tmp_path / "table", 1000) as (new, write):
        write(column=np.zeros((1, 10_000)))
        assert (new / "column.npy").stat().st_size <= 80_000 + 128
        write(column=np.zeros((999, 10_000)))


def test_what_stops_the_making_leaves_the_table_before_or_none(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), new_cache(tmp_path / "table", 4):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    # As a run that was killed leaves it, and as an older version did.
    (tmp_path / ".table.unfinished").mkdir()
    (tmp_path / ".table.unfinished" / "junk.npy").write_bytes(b"junk")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "junk.npy").write_bytes(b"junk")
    write_table(tmp_path / "table")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["last", "pair.npy", "single.npy", "table"]


def test_a_damaged_table_is_a_warning_and_a_missing_one_is_not(tmp_path: Path, capsys):
    def damaged(folder: Path) -> None:
        raise ValueError("fixed by nobody")

    assert open_cache(tmp_path, lambda folder: 5, "things") == 5
    assert open_cache(tmp_path, lambda folder: (folder / "none").read_text(), "things") is None
    assert capsys.readouterr().err == ""
    assert open_cache(tmp_path, damaged, "things") is None
    assert "the things in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([1.0, 7e4], np.float16), ([np.nan], np.float16), ([0, 65536], np.uint16), ([-1], np.uint16), ([2**31], np.int32)],
)
def test_what_does_not_fit_a_narrow_type_is_refused(values: list, dtype: type):
    with pytest.raises(UserError, match=r"the thing: values .* do not fit"):
        fitting(np.array(values), dtype, "the thing")


def test_what_fits_is_as_numpy_casts_it():
    for values, dtype in ((np.float32([65504, -1e-9, 0.1]), np.float16), (np.array([0, 65535]), np.uint16)):
        np.testing.assert_array_equal(fitting(values, dtype, ""), values.astype(dtype))
