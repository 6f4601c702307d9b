"""The table of tiles: which row applies, and that tuning finds, prints and writes one."""

import subprocess
import sys

import pytest

from pallas_kernels.attention import blocks, tune
from pallas_kernels.attention.blocks import Blocks, Row, blocks_for, read_table, write_table


def same(*tile: int) -> Blocks:
    return Blocks(tile, tile, tile)


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "TABLE_FILE", tmp_path / "blocks.json")
    read_table.cache_clear()
    yield tmp_path / "blocks.json"
    read_table.cache_clear()


def test_the_first_row_that_applies_counts(table):
    rows = [Row("a", "", 512, 0, same(1, 1)), Row("a", "", 128, 0, same(2, 2)), Row("a", "", 128, 99, same(3, 3))]
    write_table([*rows, Row("a", "v5", 512, 0, same(4, 4)), Row("b", "", 512, 0, same(5, 5))])
    assert blocks_for("a", "TPU v5 lite", 64, 7) == same(4, 4)
    assert blocks_for("a", "cpu", 64, 99) == same(3, 3)
    assert blocks_for("a", "cpu", 64, 100) == same(2, 2)
    assert blocks_for("a", "cpu", 129, 7) == same(1, 1)
    with pytest.raises(NotImplementedError, match="a: has no heads whose queries are 513 bytes wide"):
        blocks_for("a", "cpu", 513, 7)


def test_rows_of_tiles_share_a_layout():
    tiles = Blocks((192, 128), (128, 128), (64, 96))
    assert (tiles.queries, tiles.keys) == (384, 384)


def test_every_implementation_has_tiles_for_every_width():
    for implementation in tune.CANDIDATES:
        for device in ("cpu", "TPU v5 lite", "NVIDIA H200"):
            assert blocks_for(implementation, device, 1024, 1)


def test_tuning_writes_the_fastest(table, monkeypatch, capsys):
    write_table([Row("xla", "", 1024, 0, same(1, 1)), Row("tpu", "", 1024, 0, same(7, 7))])
    monkeypatch.setitem(tune.CANDIDATES, "xla", ((128, 256), (512,)))
    flags = ("--implementation", "xla", "--shape", "256", "--heads", "1", "--repeats", "1", "--write")
    monkeypatch.setattr(sys, "argv", ["tune", *flags])
    tune.main()
    found = blocks_for("xla", "cpu", 256, 979)
    assert found in (same(128, 512), same(256, 512))
    assert blocks_for("xla", "cpu", 256, 980) == same(1, 1) and blocks_for("tpu", "cpu", 256, 1) == same(7, 7)
    printed = capsys.readouterr().out
    assert printed.count("with gradients:") == 2 and f"heads of 64: {found}" in printed


def test_tuning_names_candidates_that_do_not_compile():
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.attention.tune", "--implementation", "tpu", "--shape", "256"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout.count("does not compile") == 12
    assert done.stderr.endswith("error: forward: no candidate compiles on cpu\n")
