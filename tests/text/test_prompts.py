"""Prompts files and the report of what did not fit."""

import json

import pytest

from hart_jax.errors import UserError
from hart_jax.text.prompts import check_prompts, read_prompt_lines, read_prompts_file, report_truncation


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


def test_seeds_stand_before_their_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("7\ta red apple\n\n3 blue dogs\n12 \tof  which\tone\n# 3\r\n4294967295\tx\u2028y", newline="")
    expected = [
        ("a red apple", 7, None),
        ("3 blue dogs", None, None),
        ("of  which\tone", 12, None),
        ("# 3", None, None),
        ("x\u2028y", 2**32 - 1, None),
    ]
    assert read_prompt_lines(path) == expected
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "7\\ta red\\napple", "seed": 3}\n{"prompt": "a blue dog", "size": "2:3"}\n')
    assert read_prompt_lines(path) == [("7\ta red\napple", 3, None), ("a blue dog", None, "2:3")]


@pytest.mark.parametrize(
    "line",
    [
        "a red apple",
        "[]",
        '{"prompt": 3}',
        '{"prompt": "a", "seed": "3"}',
        '{"prompt": "a", "cfg": 3}',
        '{"prompt": "a", "size": 64}',
        '{"prompt": "a", "size": [64, 96]}',
    ],
)
def test_wrong_lines_are_named(tmp_path, line):
    (tmp_path / "prompts.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"prompts\.jsonl, line "):
        read_prompt_lines(tmp_path / "prompts.jsonl")


def test_each_cut_prompt_is_reported_once(capsys):
    report_truncation(["short", "long " * 40], [False, True], 16)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("warning") == 1
    assert "first 16 tokens" in output.err
    assert "short" not in output.err


@pytest.mark.parametrize("seed", ["-1", "1.5", "4294967296", "+3", "1e3", "\u0663", "\u00b2", "a dog"])
def test_a_seed_is_a_whole_number(tmp_path, seed):
    path = tmp_path / "prompts.txt"
    path.write_text(f"a cat\n{seed}\ta blue dog\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts\.txt, line .*a blue dog.*: before the tab stands a seed"):
        read_prompt_lines(path)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_in_json_has_the_same_range(tmp_path, seed):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a dog", "seed": seed}))
    with pytest.raises(UserError, match=r"must be from 0 to 2\*\*32 - 1"):
        read_prompt_lines(path)


def test_a_prompt_is_unicode():
    with pytest.raises(UserError, match="not Unicode text"):
        check_prompts(["a dog", "a \udcff"])
