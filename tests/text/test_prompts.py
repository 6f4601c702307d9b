"""Prompts files and the report of what did not fit."""

import pytest

from hart_jax.errors import UserError
from hart_jax.text.prompts import read_prompts_file, report_truncation


def test_one_prompt_per_line_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red apple\r\n\n   \n  a café at night \n".encode())
    assert read_prompts_file(path) == ["a red apple", "a café at night"]


@pytest.mark.parametrize("content", [None, b"", b" \n\n", b"\xff\xfe\x00"])
def test_missing_empty_and_binary_files_are_user_errors(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.txt"):
        read_prompts_file(path)


def test_each_cut_prompt_is_reported_once(capsys):
    report_truncation(["short", "long " * 40], [False, True], 16)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("warning") == 1
    assert "first 16 tokens" in output.err
    assert "short" not in output.err
