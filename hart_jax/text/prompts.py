"""Prompts as the user gives them: reading, checking, and saying what did not fit."""

import json
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy


class PromptLine(NamedTuple):
    """A prompt of a file, with its seed and its size (as `hart_jax.config.sizes` takes it) where the line has them."""

    prompt: str
    seed: int | None = None
    size: str | None = None


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises `UserError` where there is no prompt, or one that is empty or only whitespace."""
    if isinstance(prompts, str):
        raise UserError(f"prompts is the string {prompts!r}; give a list of strings")
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {prompt!r} is not a string; the model takes prompts in words, not labels")
        if not prompt.strip():
            where = "the prompt" if len(prompts) == 1 else f"prompt {index + 1} of {len(prompts)}"
            raise UserError(f"{where} is empty ({prompt!r}); describe the image in words")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {prompt!r} is not Unicode text; write it in UTF-8") from None


def read_prompts_file(path: str | os.PathLike[str]) -> list[str]:
    """One prompt per line of a UTF-8 text file, stripped; blank lines are skipped, and a `#` begins no comment.

    A line ends with a line feed, a carriage return or both, and with nothing else that Unicode calls a line's end.

    Raises:
      UserError: the file is missing, is not UTF-8 text, or holds no prompt.
    """
    try:
        text = local_copy(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"prompts file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {path} is not UTF-8 text ({error})") from error
    prompts = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not prompts:
        raise UserError(f"prompts file {path} holds no prompt; write one per line")
    return prompts


def read_prompt_lines(path: str | os.PathLike[str]) -> list[PromptLine]:
    """Prompts of a file, each with what its line says of it.

    One per line, with `SEED<tab>` in front or without, where SEED is a whole number from 0 to 2**32 - 1; of a `.jsonl`,
    an object {"prompt": "...", "seed": 3, "size": "768x1152"} per line, `seed` and `size` being optional.

    Raises:
      UserError: as `read_prompts_file`, or a line is wrong. Whether a model has this size is not looked at.
    """
    lines = read_prompts_file(path)
    if os.fspath(path).endswith(".jsonl"):
        return [_from_json(line, f"prompts file {path}, line {line!r}") for line in lines]
    return [_from_line(line, f"prompts file {path}, line {line!r}") for line in lines]


def _from_line(line: str, where: str) -> PromptLine:
    seed, tab, prompt = line.partition("\t")
    if not tab:
        return PromptLine(line)
    if not re.fullmatch("[0-9]+", seed.strip()) or int(seed) >= 2**32:
        raise UserError(f"{where}: before the tab stands a seed, a whole number from 0 to 2**32 - 1, not {seed!r}")
    return PromptLine(prompt.strip(), int(seed))


def _from_json(line: str, where: str) -> PromptLine:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    known = set(PromptLine._fields)
    if not isinstance(values, dict) or set(values) - known or not isinstance(values.get("prompt"), str):
        example = '{"prompt": "a red apple", "seed": 3, "size": "768x1152"}'
        raise UserError(f"{where}: write {example}; seed and size may be left out")
    seed, size = values.get("seed"), values.get("size")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UserError(f"{where}: seed must be a whole number")
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"{where}: seed {seed} must be from 0 to 2**32 - 1")
    if size is not None and not isinstance(size, str):
        raise UserError(f'{where}: size must be a text, like "768x1152" or "2:3"')
    return PromptLine(values["prompt"], seed, size)


def report_truncation(prompts: Sequence[str], truncated: Sequence[bool], length: int) -> None:
    """Warns on stderr, once per cut prompt, that only its first `length` tokens condition the image."""
    for prompt, cut in zip(prompts, truncated, strict=True):
        if cut:
            start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            print(
                f"warning: prompt {start!r} is longer than the context; its first {length} tokens are kept "
                "(special tokens included), the rest is ignored",
                file=sys.stderr,
            )
