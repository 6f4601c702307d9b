"""Prompts that are not to be sampled, by a text classifier of the user's: a transformers folder, run with PyTorch."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json

# Whether a prompt may be sampled.
PromptFilter = Callable[[str], bool]
# What classifiers call a prompt that may.
HARMLESS = frozenset({"safe", "sfw", "ok", "normal", "neutral", "harmless", "benign", "not_toxic", "non_toxic"})


def load_prompt_filter(folder: str | Path, allows: Collection[str] = ()) -> PromptFilter:
    """A filter that lets a prompt through where the classifier's likeliest label is one of `allows`.

    Args:
      folder: with the config.json, weights and tokenizer of a transformers model for sequence classification.
      allows: labels; none: those of the model that are in HARMLESS.

    Raises:
      UserError: a file is missing or damaged, a label is none of the model's, none is known to be harmless, or PyTorch
        or transformers is not installed.
    """
    folder = local_copy(folder)
    labels = _labels(folder)
    unknown = sorted(set(allows) - set(labels))
    if unknown:
        raise UserError(f"--prompt_filter_allows={unknown[0]}: the labels of {folder} are {', '.join(labels)}")
    passing = frozenset(allows) or {name for name in labels if name.lower().replace("-", "_") in HARMLESS}
    if not passing or len(passing) == len(labels):
        raise UserError(
            f"{folder}: which of {', '.join(labels)} lets a prompt through? Say so with --prompt_filter_allows"
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise UserError(
            f"--prompt_filter={folder}: runs on PyTorch and transformers; install them with: pip install torch "
            "'hart_jax[transformers]', or set --prompt_filter=off"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        ).eval()
    except Exception as error:  # a damaged file raises whatever the library's parsers do
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"--prompt_filter={folder}: cannot be read ({reason})") from error

    def is_allowed(prompt: str) -> bool:
        tokens = tokenizer(prompt, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return labels[int(model(**tokens).logits[0].argmax())] in passing

    return is_allowed


def _labels(folder: Path) -> list[str]:
    names = read_json(folder / "config.json").get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(str(number) for number in range(len(names))):
        raise UserError(f"{folder / 'config.json'}: no id2label, which names a classifier's labels")
    return [str(names[str(number)]) for number in range(len(names))]
