"""What "auto" takes on a device follows from what was measured there, and from nothing else."""

import dataclasses
import functools
import json
import types

import jax
import pytest

from pallas_kernels.attention import attention, measured
from pallas_kernels.attention.measured import RIGHT, Row, fastest, read_table, write_rows

ROW = Row("NVIDIA H200", "1024", "cudnn", "bfloat16", 64, 1e-3, 2.0, 8.0, "0.12.0", "2026-11-28")
FASTER = dataclasses.replace(ROW, implementation="gpu", both_ms=7.0)
ASKED = "NVIDIA H200", 9000, "bfloat16", 64


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "TABLE_FILE", tmp_path / "measured.json")
    measured.TABLE_FILE.write_text("[]")
    read_table.cache_clear()
    yield
    read_table.cache_clear()


@pytest.mark.parametrize(
    ("rows", "asked", "expected"),
    [
        ([], ASKED, "cudnn"),
        ([ROW], ASKED, "cudnn"),
        ([FASTER], ASKED, "cudnn"),
        ([ROW, FASTER], ASKED, "gpu"),
        ([ROW, dataclasses.replace(FASTER, both_ms=9.0)], ASKED, "cudnn"),
        ([ROW, dataclasses.replace(FASTER, error=2 * RIGHT)], ASKED, "cudnn"),
        ([dataclasses.replace(ROW, error=float("nan")), dataclasses.replace(FASTER, both_ms=9.0)], ASKED, "gpu"),
        ([ROW, FASTER, dataclasses.replace(FASTER, implementation="tokamax", both_ms=6.0)], ASKED, "tokamax"),
        ([ROW, FASTER], ("NVIDIA H100 80GB HBM3", *ASKED[1:]), "cudnn"),
        ([ROW, FASTER], (*ASKED[:2], "float16", 64), "cudnn"),
        ([ROW, FASTER], (*ASKED[:3], 128), "cudnn"),
        # At 256 px cuDNN was faster, and that shape is nearer.
        ([ROW, FASTER, dataclasses.replace(ROW, shape="256"), dataclasses.replace(FASTER, shape="256", both_ms=9.0)],
         ("NVIDIA H200", 600, "bfloat16", 64), "cudnn"),
    ],
    ids=str,
)  # fmt: skip
def test_the_right_and_fastest_is_taken(rows, asked, expected):
    write_rows(rows)
    assert fastest("cudnn", ("gpu", "tokamax"), *asked) == expected


def test_a_row_takes_the_place_of_an_older_one():
    write_rows([ROW, FASTER])
    newer = dataclasses.replace(ROW, both_ms=5.0, date="2026-12-01")
    write_rows([newer])
    assert read_table() == (newer, FASTER)


@pytest.mark.parametrize(("rows", "expected"), [([], "dot_product_attention_fwd"), ([ROW, FASTER], "gmem")])
def test_auto_reads_the_table(monkeypatch, rows, expected):
    write_rows(rows)
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr("pallas_kernels.attention._device", lambda: device)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_compute_capability", lambda *_: True)
    q = jax.ShapeDtypeStruct((1, 512, 1, 64), "bfloat16")
    assert expected in str(jax.make_jaxpr(functools.partial(attention, scale=0.3))(q, q, q))


def test_the_table_in_the_repository_is_of_devices(monkeypatch):
    """Whatever it holds has been measured on hardware: an error and times, all finite."""
    monkeypatch.undo()
    read_table.cache_clear()
    rows = json.loads(measured.TABLE_FILE.read_text())
    assert [dataclasses.asdict(row) for row in read_table()] == rows
    assert all(row.device != "cpu" and 0 < row.forward_ms <= row.both_ms for row in read_table())
