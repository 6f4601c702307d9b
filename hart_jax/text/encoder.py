"""What every frozen text encoder offers: prompts in, one state per context position out.

Letters: B prompts, T context positions, D width of the states, N input tokens, the last T of which are the context.
A system prompt, where an encoder has one, is not among the inputs: the encoder puts it in front and drops its states.
It is a file, given by name or lying beside the encoder's weights as `SYSTEM_PROMPT_FILE`.
"""

import abc
import importlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.buckets import local_copy
from hart_jax.io.files import read_json
from hart_jax.parallel.mesh import MeshLayout

# The module of each `model_type` has `load(folder, ...) -> TextEncoder`; imported only when it is asked for.
_MODULES = {
    "bert": "hart_jax.text.minilm",
    "qwen2": "hart_jax.text.qwen2_encoder",
    "qwen2_vl": "hart_jax.text.qwen2_encoder",
}
SYSTEM_PROMPT_FILE = "system_prompt.txt"


@dataclass(frozen=True)
class TextEmbeddings:
    """Encoded prompts.

    Attributes:
      states_BTD: float32 states; at padding positions they are what the encoder computes there, not zero.
      mask_BT: int32, 1 where a position holds a token of the prompt and 0 where it is padding, which is on the right or
        on the left, as the encoder has it.
      truncated: for each prompt, whether it did not fit into T positions and was cut.
    """

    states_BTD: jax.Array
    mask_BT: np.ndarray
    truncated: tuple[bool, ...]


class TextEncoder(abc.ABC):
    """A frozen text encoder; subclasses give `tokenize` and `encode`.

    A pickled encoder, for data workers, can only `tokenize`.

    Attributes:
      context_dim: D, the width of the states.
      layout: how weights and batches lie on a mesh; None: all on the default device.
    """

    context_dim: int
    layout: MeshLayout | None

    @abc.abstractmethod
    def tokenize(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, tuple[bool, ...]]:
        """Token ids of the prompts, each padded or cut to `length` context positions.

        Returns:
          input_ids_BN (int32), mask_BN (int32, 0 at padding), and for each prompt whether it was cut.

        Raises:
          UserError: a prompt is empty, or the encoder has no room for `length` positions.
        """

    @abc.abstractmethod
    def encode(self, input_ids_BN: jax.Array | np.ndarray, mask_BN: jax.Array | np.ndarray) -> jax.Array:
        """States_BTD (float32) of tokens; compiled once per shape. Padding is not attended to.

        On a mesh every process gives the same tokens, and the states are whole on every device.
        """

    @abc.abstractmethod
    def encode_batch(self, input_ids_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
        """States_BTD (float32) of tokens that are on the devices already; nothing goes through the host.

        On a mesh tokens and states lie as `layout.batch` has them, and every process calls it in the same order.
        """

    @abc.abstractmethod
    def batch_flops(self, batch_size: int, length: int) -> float:
        """FLOPs of `encode_batch` of (B, N) tokens, of all devices together; nothing of it is computed."""

    def __call__(self, prompts: Sequence[str], length: int) -> TextEmbeddings:
        """Tokenizes and encodes `prompts` for a context of `length` positions."""
        input_ids_BN, mask_BN, truncated = self.tokenize(prompts, length)
        return TextEmbeddings(self.encode(input_ids_BN, mask_BN), mask_BN[:, -length:], truncated)


def load_text_encoder(folder: str | os.PathLike[str], **options: Any) -> TextEncoder:
    """The encoder in `folder`, by the `model_type` of its config.json, with the weights and tokenizer beside it.

    `options` are those of the `load` of that type's module, e.g. `system_prompt` of `hart_jax.text.qwen2_encoder`; one
    that is None is not given. Without a `system_prompt` that of the folder is used, if it has one.

    Raises:
      UserError: a file is missing or damaged, the type of model is unknown, or it has no such option.
    """
    path = local_copy(folder)
    model_type, load = _loader(path)
    given = {name: value for name, value in options.items() if value is not None}
    if (path / SYSTEM_PROMPT_FILE).is_file():
        given.setdefault("system_prompt", path / SYSTEM_PROMPT_FILE)
    unknown = sorted(set(given) - set(inspect.signature(load).parameters))
    if unknown:
        raise UserError(f"{path}: a text encoder of type {model_type} has no setting {unknown[0]}; leave it out")
    return load(path, **given)


def text_options(
    folder: str | os.PathLike[str], system_prompt: str | os.PathLike[str] | None, dtype: str = "auto"
) -> dict[str, Any]:
    """What `load_text_encoder` takes for this folder, beside a layout.

    Args:
      folder: of the encoder.
      system_prompt: its file, or None or empty for the one in the folder, or none.
      dtype: of encoders that have the choice, as they take it; "auto" is float32 on CPUs, bfloat16 elsewhere.

    Raises:
      UserError: the folder has no readable config.json of a known model.
    """
    path = local_copy(folder)
    beside = path / SYSTEM_PROMPT_FILE
    options: dict[str, Any] = {"system_prompt": system_prompt or (beside if beside.is_file() else None)}
    if "dtype" in inspect.signature(_loader(path)[1]).parameters:
        on_cpu = jax.default_backend() == "cpu"
        options["dtype"] = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
    return options


def _loader(path: Path) -> tuple[str, Any]:
    """The type of the encoder in a folder, and its module's `load`."""
    model_type = read_json(path / "config.json").get("model_type")
    if model_type not in _MODULES:
        raise UserError(
            f"{path / 'config.json'}: model_type {model_type!r} is unknown; known are {', '.join(_MODULES)}"
        )
    return model_type, importlib.import_module(_MODULES[model_type]).load
