"""The text encoder of HART's release: prompts to the states of a Qwen2 that reads a system prompt first.

A prompt is tokenized without a chat template, padded to T on the side that its tokenizer pads, and put behind the
system prompt, whose keys and values are computed once. Letters as in `hart_jax.text.qwen2`; here N = T.
"""

import functools
import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json
from hart_jax.nn.flop_counter import flops_of
from hart_jax.parallel.mesh import MeshLayout, activate, put_global
from hart_jax.parallel.rules import parameter_axes
from hart_jax.text.encoder import TextEncoder
from hart_jax.text.program import make_encode, make_key_values
from hart_jax.text.prompts import check_prompts
from hart_jax.text.qwen2 import KeyValues, Qwen2Config, abstract_params, no_prefix
from hart_jax.text.qwen2_weights import read_qwen2, stored_params
from hart_jax.text.system_prompt import read_system_prompt
from hart_jax.text.tokenizer_json import read_tokenizer

# What a Qwen2 pads with where its settings do not say.
_PAD = "<|endoftext|>"
DTYPES = ("float32", "bfloat16", "int8")
# The logits of 12 heads, 300 tokens and 450 keys are 200 MB for so many prompts.
ROWS_PER_DEVICE = 32


@dataclass(frozen=True)
class PromptTokenizer:
    """A Hugging Face tokenizer, reduced to what padded prompts need; picklable.

    `pads` and `cuts` are the sides, "left" or "right", that it pads and truncates on.
    """

    backend: Tokenizer
    pad_id: int
    pads: str
    cuts: str

    @property
    def special_tokens(self) -> int:
        """How many tokens it adds to every text (none in a published Qwen2)."""
        return self.backend.num_special_tokens_to_add(is_pair=False)

    def __call__(self, text: str, length: int) -> tuple[list[int], bool]:
        """Tokens of a text, at most `length`, and whether it was cut."""
        room = length - self.special_tokens
        encoding = self.backend.encode(text, add_special_tokens=False)
        cut = len(encoding) > room
        encoding.truncate(room, direction=self.cuts)
        return self.backend.post_process(encoding).ids, cut


class Qwen2Encoder(TextEncoder):
    """`TextEncoder` over Qwen2 behind a system prompt; an empty one is none."""

    def __init__(
        self,
        config: Qwen2Config,
        params: Any,
        tokenizer: PromptTokenizer,
        system_prompt: str = "",
        dtype: jnp.dtype = jnp.float32,
        layout: MeshLayout | None = None,
    ):
        """Takes parameters of `Qwen2(config)`, laid out by `layout` if there is one; `dtype` is the compute type."""
        self.config = config
        self.context_dim = config.hidden_size
        self.params = params
        self._tokenizer, self._system_prompt, self._dtype = tokenizer, system_prompt, dtype
        self.layout, self._prefixes = layout, dict[int, KeyValues]()
        self._encode = make_encode(config, dtype, layout)
        self._encode_batch = make_encode(config, dtype, layout, split=True)
        self._key_values = make_key_values(config, dtype, layout)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "context_dim": self.context_dim, "_tokenizer": self._tokenizer}

    def tokenize(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, tuple[bool, ...]]:
        check_prompts(prompts)
        shortest = self._tokenizer.special_tokens + 1
        if length < shortest:
            raise UserError(
                f"context length {length} does not suit this text encoder; choose {shortest} or more (HART has 300)"
            )
        input_ids_BT = np.full((len(prompts), length), self._tokenizer.pad_id, np.int32)
        truncated = []
        for row, prompt in enumerate(prompts):
            ids, cut = self._tokenizer(prompt, length)
            where = slice(length - len(ids), None) if self._tokenizer.pads == "left" else slice(len(ids))
            input_ids_BT[row, where] = ids
            truncated.append(cut)
        # As the reference has it: a padding token that a prompt spells out counts as padding, too.
        return input_ids_BT, (input_ids_BT != self._tokenizer.pad_id).astype(np.int32), tuple(truncated)

    def encode(self, input_ids_BN: jax.Array | np.ndarray, mask_BN: jax.Array | np.ndarray) -> jax.Array:
        """States of tokens behind the system prompt, which is cut to T tokens as a prompt is; see `TextEncoder`.

        Many prompts go through the model in parts of ROWS_PER_DEVICE. On a mesh the states are whole on every device;
        every process gives the same prompts.
        """
        input_ids_BT, mask_BT = np.asarray(input_ids_BN), np.asarray(mask_BN)
        count, length = input_ids_BT.shape
        prefix, rows = self._prefix(length), ROWS_PER_DEVICE * self._batch_parts
        parts = [
            self._run(self._encode, input_ids_BT[start : start + rows], mask_BT[start : start + rows], prefix)
            for start in range(0, count, rows)
        ]
        return (jnp.concatenate(parts) if len(parts) > 1 else parts[0])[:count]

    def encode_batch(self, input_ids_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
        prefix = self._prefix(input_ids_BN.shape[1])
        with activate(self.layout):
            return self._encode_batch(self.params, input_ids_BN, mask_BN, prefix)

    def batch_flops(self, batch_size: int, length: int) -> float:
        tokens_BN, prefix = jax.ShapeDtypeStruct((batch_size, length), jnp.int32), self._prefix(length)
        with activate(self.layout):
            return flops_of(self._encode_batch.trace(self.params, tokens_BN, tokens_BN, prefix).jaxpr.jaxpr)

    def _prefix(self, length: int) -> KeyValues:
        ids = self._tokenizer(self._system_prompt, length)[0] if self._system_prompt else []
        if len(ids) not in self._prefixes:
            prefix = no_prefix(self.config, self._dtype)
            if ids:
                ids_1P = np.array([ids], np.int32)
                own = self._run(self._key_values, ids_1P, np.ones_like(ids_1P), prefix)
                # Of one row, however many the mesh needed.
                prefix = jax.tree.map(lambda array: array[:, :1], own)
            self._prefixes[len(ids)] = prefix
        return self._prefixes[len(ids)]

    @property
    def _batch_parts(self) -> int:
        return self.layout.batch_shards if self.layout else 1

    def _run(self, function: Any, input_ids_BT: np.ndarray, mask_BT: np.ndarray, prefix: KeyValues) -> Any:
        """`function` of a batch, on a mesh with its last row repeated until the devices divide it."""
        if self.layout is None:
            return function(self.params, input_ids_BT, mask_BT, prefix)
        with self.layout.activate():
            return function(self.params, *self.layout.put_padded((input_ids_BT, mask_BT)), prefix)


def load(
    folder: str | Path,
    *,
    system_prompt: str | Path | None = None,
    dtype: str = "bfloat16",
    layout: MeshLayout | None = None,
) -> Qwen2Encoder:
    """The encoder in a published folder: config.json, weights (safetensors), and the tokenizer's files.

    Args:
      folder: of a Qwen2 or Qwen2-VL, of any size.
      system_prompt: file of the system prompt (see `read_system_prompt`); without one there is none.
      dtype: "float32" or "bfloat16", of the parameters and of what is computed; "int8": matrices and embedding as
        `hart_jax.nn.int8` has them, and computing in float32 on CPUs, bfloat16 elsewhere. States are float32.
      layout: lays the parameters out over a mesh; without one they lie on the default device.

    Raises:
      UserError: a file is missing or damaged, or is of a model that computes something else; nothing large is read
        before all that is small is checked.
    """
    folder = local_copy(folder)
    config = Qwen2Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    if dtype not in DTYPES:
        raise UserError(f"text encoder: dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    text = "" if system_prompt is None else read_system_prompt(system_prompt)
    tokenizer = read_prompt_tokenizer(folder, config)
    params = _load_params(folder, config, jnp.dtype(dtype), layout)
    if dtype == "int8":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Qwen2Encoder(config, params, tokenizer, text, jnp.dtype(dtype), layout)


def _load_params(folder: Path, config: Qwen2Config, dtype: np.dtype, layout: MeshLayout | None) -> Any:
    if layout is None:
        return read_qwen2(folder, config, dtype, lambda _, value: jax.tree.map(jnp.asarray, value))
    shardings = layout.state_shardings(stored_params(config, dtype), parameter_axes(abstract_params(config)))
    return read_qwen2(
        folder,
        config,
        dtype,
        lambda path, value: put_global(value, functools.reduce(operator.getitem, path, shardings)),
    )


def read_prompt_tokenizer(folder: Path, config: Qwen2Config) -> PromptTokenizer:
    """The tokenizer in a published folder: tokenizer.json, or where there is none vocab.json and merges.txt, padded and
    cut as tokenizer_config.json says.

    Raises:
      UserError: a file is missing or damaged, the padding token is unknown, or a token has no row in the embedding.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no tokenizer_config.json, which says how prompts are padded; copy the whole folder")
    try:
        # Not `read_json`: some files have a length without a limit, which takes more than 64 bits.
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = {name: settings.get(name, "right") for name in ("padding_side", "truncation_side")}
        pad = settings.get("pad_token", _PAD)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable JSON object ({error})") from error
    for name, side in names.items():
        if side not in ("left", "right"):
            raise UserError(f"{path}: {name} is {side!r}; it must be left or right")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is None:
        raise UserError(f"{path}: no pad_token, which prompts are padded with")
    backend = _backend(folder)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if pad not in vocabulary:
        raise UserError(f"{path}: the tokenizer has no token {pad!r}, which is its pad_token")
    rows = max(vocabulary.values()) + 1
    if rows > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {rows} tokens but the embedding only {config.vocab_size} rows")
    return PromptTokenizer(backend, vocabulary[pad], names["padding_side"], names["truncation_side"])


def _backend(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder / "tokenizer.json")
    if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise UserError(f"{folder}: no tokenizer.json, nor vocab.json and merges.txt; copy the whole folder")
    # Otherwise it says on stderr that PyTorch is not installed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"{folder}: without tokenizer.json it needs transformers; copy that file too, or install it with: "
            "pip install 'hart_jax[transformers]'"
        ) from error
    try:
        published = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        backend: Tokenizer = published.backend_tokenizer
    except Exception as error:  # a damaged file raises whatever the library's parsers do
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from error
    backend.no_padding()
    backend.no_truncation()
    return backend
