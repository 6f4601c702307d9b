"""The system prompt that HART's text encoder reads before every prompt, from a file of the user's."""

import ast
from pathlib import Path

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy

CONSTANT = "llm_system_prompt"
CONSTANTS_FILE = Path("hart", "utils", "constants.py")


def read_system_prompt(path: str | Path) -> str:
    """The text of a file; of a clone of the public code of HART, or its `constants.py`, the constant there.

    A text file counts to the last character: spaces and newlines at its end are tokens of the system prompt, and the
    published one ends in a newline, as editors leave it. Only a byte-order mark is left out, and a Windows line end
    counts as "\\n".

    Raises:
      UserError: the file is missing, empty or not UTF-8 text, or a Python file does not have the constant.
    """
    path = local_copy(path)
    if path.is_dir():
        path = path / CONSTANTS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"system prompt {path} cannot be read: {error.strerror}") from error
    if path.suffix == ".py":
        return _constant(content, path)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"system prompt {path} is not UTF-8 text ({error})") from error
    if not text.strip():
        raise UserError(f"system prompt {path} is empty; name a file with text, or none")
    return text


def _constant(content: bytes, path: Path) -> str:
    """The string that a Python file gives to CONSTANT, last of all; its code is parsed, not run."""
    try:
        statements = ast.parse(content).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"system prompt {path} is not a Python file ({error})") from error
    values = [
        statement.value
        for statement in statements
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in (statement.targets if isinstance(statement, ast.Assign) else [statement.target])
        if isinstance(target, ast.Name) and target.id == CONSTANT
    ]
    if not values:
        raise UserError(f"system prompt {path} has no constant {CONSTANT}; name a text file, or HART's constants.py")
    value = values[-1]
    if not isinstance(value, ast.Constant) or not isinstance(value.value, str) or not value.value:
        raise UserError(f"system prompt {path}: {CONSTANT} is not a plain string; put its text in a file and name that")
    return value.value
