"""The benchmark of attention prints its tables."""

import sys

import pytest

from benchmarks import attention


def run(monkeypatch, capsys, *flags: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["attention.py", *flags])
    attention.main()
    return capsys.readouterr().out.splitlines()


def test_times(monkeypatch, capsys):
    flags = ("--shapes", "256 half", "--batch", "1", "--heads", "1", "--repeats", "1")
    device, *_, row = run(monkeypatch, capsys, *flags)
    assert device.startswith("cpu, JAX ") and device.endswith("batch 1, 1 heads of 64, float32")
    assert row.startswith("| 256 half | xla | ") and row.count("%") == 2


def test_tiles(monkeypatch, capsys):
    *_, row = run(monkeypatch, capsys, "--tiles", "--shapes", "1024")
    assert row == "| 1024 | 512 x 1024 | 114.2 | 129 | 129 | 20 | 0.74 |"


@pytest.mark.torch
def test_pytorch_is_compared_where_it_is_installed(monkeypatch, capsys):
    pytest.importorskip("torch")
    flags = ("--torch", "--shapes", "256 half", "--batch", "1", "--heads", "1", "--repeats", "1")
    *_, row, summary = run(monkeypatch, capsys, *flags)
    assert row.startswith("| 256 half | PyTorch | ") and "times as fast as PyTorch forward" in summary
