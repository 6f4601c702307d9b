"""The file tokenizer.json, in which Hugging Face's tokenizers keep what makes tokens of a text."""

import os
from pathlib import Path

from tokenizers import Tokenizer

from hart_jax.errors import UserError


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the padding and truncation that the file may ask for."""
    if not Path(path).is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any bad file
        raise UserError(f"tokenizer file {path} cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
