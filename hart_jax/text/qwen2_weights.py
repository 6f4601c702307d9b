"""A published Qwen2 or Qwen2-VL in our parameters, tensor by tensor, so that the whole model lies in memory once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from hart_jax.errors import UserError
from hart_jax.io.int8_scheme import Int8, quantize_matrix
from hart_jax.io.state_dict import StateDict
from hart_jax.io.tensor_files import open_tensors, weight_file
from hart_jax.nn.int8 import quantize
from hart_jax.text.qwen2 import Qwen2Config, abstract_params

ParameterPath = tuple[str, ...]
Parameter = np.ndarray | Int8

# Of the language model in files of: newer and older transformers, and the model without its output layer.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
_VISION = ("visual.", "model.visual.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

# Ours -> theirs, within a layer.
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def read_qwen2(
    folder: Path, config: Qwen2Config, dtype: np.dtype, put: Callable[[ParameterPath, Parameter], Any]
) -> dict[str, Any]:
    """Parameters of `Qwen2(config)` from a folder with model.safetensors, or several files and their index.

    The vision tower and the output layer are left out.

    Args:
      folder: the published folder.
      config: of its config.json.
      dtype: what the parameters are converted to; int8: the matrices to `Int8`, the others to float32.
      put: takes a parameter's path and value, and places it on a device before the next one is read.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, of another shape, or has no place in a Qwen2;
        missing and unknown names are found before anything is read.
    """
    file = weight_file(folder, "model")
    tensors = open_tensors(file)
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise UserError(f"{file}: no tensor embed_tokens.weight, under any known prefix; this is not a Qwen2")
    stored = flatten_dict(stored_params(config, dtype))
    names = {path: [prefix + name for name in _published(path, config)] for path in stored}
    _check_names(tensors, {name for group in names.values() for name in group}, str(file))

    read = {path: put(path, _read(tensors, names[path], path, stored[path], str(file))) for path in stored}
    return unflatten_dict(read)


def stored_params(config: Qwen2Config, dtype: np.dtype) -> Any:
    """Shapes of the parameters that `read_qwen2` gives."""
    abstract = nn.meta.unbox(abstract_params(config))
    if dtype == np.int8:
        return jax.eval_shape(quantize, abstract)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract)


def _published(path: ParameterPath, config: Qwen2Config) -> list[str]:
    """Published names of one of our parameters, one for each layer where it is of the layers."""
    if path[0] != "layers":
        return ["embed_tokens.weight" if path == ("embedding",) else "norm.weight"]
    _, part, leaf = path
    tail = f"{_LAYER_NAMES[part]}.{_LEAF_NAMES[leaf]}"
    return [f"layers.{index}.{tail}" for index in range(config.num_hidden_layers)]


def _check_names(tensors: Mapping[str, np.ndarray], wanted: set[str], source: str) -> None:
    missing = sorted(wanted - set(tensors))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: no tensor {missing[0]!r}{more}; this is not the model its config.json says")
    state = StateDict(tensors, source)
    unused = (name for name in tensors if name.startswith(_VISION) or name.endswith("rotary_emb.inv_freq"))
    state.explain(*wanted, *unused, *_HEADS)
    state.finish()


def _read(
    tensors: Mapping[str, np.ndarray], names: list[str], path: ParameterPath, abstract: Any, source: str
) -> Parameter:
    value = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    layers = value if path[0] == "layers" else jax.tree.map(lambda leaf: leaf[None], value)
    for layer, name in enumerate(names):
        tensor, expected = tensors[name], layers.shape[1:]
        # A linear layer's weight is (out, in).
        if path[-1] == "kernel":
            expected = expected[::-1]
        if tensor.shape != expected:
            raise UserError(f"{source}: tensor {name!r} is {tensor.shape}; by its config.json it is {expected}")
        ours = tensor.T if path[-1] == "kernel" else tensor
        part = quantize_matrix(ours, path[-1], name) if isinstance(value, Int8) else ours
        for whole, piece in zip(jax.tree.leaves(layers), jax.tree.leaves(part), strict=True):
            whole[layer] = piece
    return value
