"""Tokens and text embeddings inside the records of shards, where `hart_jax.data.precompute` has put them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.config import TokenizerConfig
from hart_jax.data.shards import Folders, RecordSource, as_paths
from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.fingerprint import differences, sha256, sha256sum
from hart_jax.text.system_prompt import read_system_prompt

TOKENS, TEXTS = "tokens", "texts"


def index_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest type that holds every code's index; at least 16 bits."""
    return np.uint16 if vocab_size <= np.iinfo(np.uint16).max + 1 else np.uint32


def describe_indices(vocab_size: int) -> dict[str, str]:
    """What is said of tokens beside their tokenizer: the type of their indices, where it is not 16 bits."""
    kind = index_type(vocab_size)
    return {} if kind is np.uint16 else {"indices": np.dtype(kind).name}


def describe_tokens(config: TokenizerConfig, params: Any, buckets: Sequence[str] = ()) -> dict[str, Any]:
    """What shards say of tokens by this tokenizer, of images in these buckets."""
    weights = map(np.asarray, jax.tree.leaves(params))
    of_buckets = {"buckets": list(buckets)} if buckets else {}
    return {
        "tokenizer": sha256(json.dumps(config.to_dict()), *weights),
        **describe_indices(config.vocab_size),
        **of_buckets,
    }


def describe_texts(
    encoder_folder: str | Path, positions: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What shards say of text embeddings by the encoder in this folder, of so many positions; `options`: its own."""
    listing = "".join(f"{path.name} {sha256sum(path)}\n" for path in _encoder_files(local_copy(encoder_folder)))
    about = {"text_encoder": sha256(listing), "positions": positions}
    options = options or {}
    # Encoders that have neither say nothing of them.
    if "dtype" in options:
        about["dtype"] = options["dtype"]
    if options.get("system_prompt"):
        about["system_prompt"] = sha256(read_system_prompt(options["system_prompt"]))
    return about


def _encoder_files(folder: Path) -> list[Path]:
    """What an encoder's states depend on: its settings, its weights, and its vocabulary."""
    files = sorted(folder.iterdir())
    kinds = {".json", ".safetensors"}
    if not any(path.suffix == ".safetensors" for path in files):
        kinds.add(".bin")
    # Read only where there is no tokenizer.json.
    merges = {"merges.txt"} if not (folder / "tokenizer.json").is_file() else set()
    return [path for path in files if path.suffix in kinds or path.name in merges]


def is_precomputed(shards: Folders, field: str, wanted: Callable[[], dict[str, Any]]) -> bool:
    """Whether all records have this field.

    Args:
      field: `TOKENS` or `TEXTS`.
      wanted: gives `describe_tokens` or `describe_texts` of the models in use; called only where it is needed.

    Raises:
      UserError: they have it, but from other models.
    """
    found = [about.get(field) for about in RecordSource(shards).precomputed]
    if not all(found):
        return False
    expected = wanted()
    for folder, about in zip(as_paths(shards), found, strict=True):
        if changed := differences(expected, about):
            raise UserError(
                f"{folder}: the {field} in its records were computed with another {', '.join(changed)}; compute them "
                "anew (python -m hart_jax.data.precompute) or train on the shards without them"
            )
    return True


def pack(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as msgpack takes them."""
    return {
        name: {"dtype": array.dtype.str, "shape": array.shape, "bytes": np.ascontiguousarray(array).tobytes()}
        for name, array in arrays.items()
    }


def unpack(packed: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `pack`.

    Raises:
      UserError: it is something else.
    """
    try:
        return {
            name: np.frombuffer(array["bytes"], array["dtype"]).reshape(array["shape"])
            for name, array in packed.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"what was computed ahead is damaged ({error}); compute it anew") from error


class PrecomputedTokens:
    """image number -> {"indices": (L,) int32, "f_rest": (P, C), "ar_input": (L-1, C) float16}, from its record.

    Raises:
      UserError: when asked for an image that did not decode, or a damaged record.
    """

    def __init__(self, shards: Folders):
        self._records = RecordSource(shards)

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        packed = self._records[index][TOKENS]
        if packed is None:
            raise UserError(f"image {index} of the shards did not decode when its tokens were computed")
        row = unpack(packed)
        return {**row, "indices": row["indices"].astype(np.int32)}


class PrecomputedTexts:
    """(record, number of its caption) -> {"text": (T, D) float16, "mask": (T,) int32}, from the record."""

    def __init__(self, shards: Folders):
        self._records = RecordSource(shards)

    def at(self, index: int, number: int) -> dict[str, np.ndarray]:
        return unpack(self._records[index][TEXTS][number])
