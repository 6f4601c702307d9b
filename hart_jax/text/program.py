"""Encoding tokens as a function laid out over a mesh: text encoders run it on prompts, a plan compiles it.

Letters as in `hart_jax.text.encoder`, and P tokens of a system prompt.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hart_jax.errors import UserError
from hart_jax.io.files import read_json
from hart_jax.nn.rounds import in_rounds
from hart_jax.parallel.mesh import MeshLayout, put_global
from hart_jax.parallel.program import Program
from hart_jax.parallel.rules import parameter_axes
from hart_jax.text import minilm_model, qwen2
from hart_jax.text.minilm_model import MiniLM, MiniLMConfig
from hart_jax.text.qwen2 import KeyValues, Qwen2, Qwen2Config
from hart_jax.text.qwen2_weights import stored_params

EncoderConfig = MiniLMConfig | Qwen2Config

# A device encodes so many prompts at a time that their logits take no more: 41 of 12 heads, 300 tokens and 450 keys.
LOGITS_BYTES = 2**28


def read_encoder_config(path: Path) -> EncoderConfig:
    """The config in an encoder's config.json; `UserError` if it is missing or of no encoder that is known."""
    values = read_json(path)
    kinds: dict[Any, Any] = {"qwen2": Qwen2Config, "qwen2_vl": Qwen2Config, "bert": MiniLMConfig}
    if values.get("model_type") not in kinds:
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}; known are {', '.join(kinds)}")
    return kinds[values["model_type"]].from_json(values, str(path))


@dataclasses.dataclass(frozen=True)
class EncodeProgram:
    """Encoding a batch on all devices of a mesh.

    `encode` is (params, input_ids_BN, mask_BN, prefix) -> states_BTD; `arguments` are these's shapes with their places.
    """

    encode: Program
    arguments: tuple[Any, ...]
    layout: MeshLayout

    def trace(self) -> Any:
        """The program, traced for its arguments: to be lowered, compiled or counted."""
        return self.encode.trace(*self.arguments)


def encode_program(
    config: EncoderConfig,
    layout: MeshLayout,
    batch_size: int,
    length: int,
    dtype: str = "float32",
    prefix_tokens: int = 0,
    split: bool = True,
) -> EncodeProgram:
    """The program by which an encoder of this config encodes a batch; nothing is allocated.

    Args:
      config: of the text encoder.
      layout: of its weights and of the batch.
      batch_size: B, a multiple of `layout.batch_shards`.
      length: T.
      dtype: as `hart_jax.text.qwen2_encoder.load` takes it; a MiniLM is always float32.
      prefix_tokens: P.
      split: states lie as `layout.batch` (training); otherwise whole on every device (sampling).
    """
    weights = _at(_shapes(config, dtype), _shardings(config, dtype, layout))
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32, sharding=layout.batch)
    prefix = None
    if isinstance(config, Qwen2Config):
        heads = config.num_hidden_layers, 1, prefix_tokens, config.num_key_value_heads, config.head_dim
        before: Any = jax.ShapeDtypeStruct(heads, _compute(dtype), sharding=layout.replicated)
        prefix = KeyValues(before, before)
    encode = make_encode(config, _compute(dtype), layout, split=split)
    return EncodeProgram(encode, (weights, tokens, tokens, prefix), layout)


def make_encode(config: EncoderConfig, dtype: Any, layout: MeshLayout | None, *, split: bool = False) -> Program:
    """The program (params, input_ids_BN, mask_BN, prefix) -> states_BTD (float32); `dtype` is the compute type.

    A MiniLM's prefix is None. On a mesh the states are whole on every device, or, if `split`, lie as `layout.batch`,
    each device encoding some of its rows after the others where their logits are many.
    """
    states_of = _states_of(config, jnp.dtype(dtype))

    def encode(params: Any, input_ids_BN: jax.Array, mask_BN: jax.Array, prefix: KeyValues | None) -> jax.Array:
        if not split:
            return states_of(params, input_ids_BN, mask_BN, prefix)
        length = input_ids_BN.shape[1]
        keys = length + (prefix.keys.shape[2] if prefix else 0)
        at_once = max(1, LOGITS_BYTES // (4 * config.num_attention_heads * length * keys))
        return in_rounds(lambda part: states_of(params, *part, prefix), (input_ids_BN, mask_BN), at_once)

    sharding = None if layout is None else layout.batch if split else layout.replicated
    return Program("text encoder", encode, layout, dtype, out_shardings=sharding)


def make_key_values(config: Qwen2Config, dtype: Any, layout: MeshLayout | None) -> Program:
    """The program (params, input_ids_BP, mask_BP, no prefix) -> `KeyValues`, by which a system prompt becomes a prefix;
    on a mesh they are whole on every device."""
    model, sharding = Qwen2(config, dtype), layout.replicated if layout else None

    def key_values(params: Any, *inputs: Any) -> KeyValues:
        return model.apply({"params": params}, *inputs)[1]

    return Program("system prompt", key_values, layout, dtype, out_shardings=sharding)


def put_params(config: EncoderConfig, params: Any, layout: MeshLayout | None) -> Any:
    """Host parameters on the default device, or laid out over a mesh by its rules."""
    if layout is None:
        return jax.tree.map(jnp.asarray, params)
    return put_global(params, layout.state_shardings(params, parameter_axes(_boxed(config))))


def _states_of(config: EncoderConfig, dtype: jnp.dtype) -> Callable[..., jax.Array]:
    if isinstance(config, MiniLMConfig):
        small = MiniLM(config)
        return lambda params, ids_BN, mask_BN, _: small.apply({"params": params}, ids_BN, mask_BN)
    large = Qwen2(config, dtype)
    return lambda params, ids_BN, mask_BN, prefix: large.apply({"params": params}, ids_BN, mask_BN, prefix)[0]


def _compute(dtype: str) -> str:
    """The compute type of weights of this type, on an accelerator."""
    return "bfloat16" if dtype == "int8" else dtype


def _boxed(config: EncoderConfig) -> Any:
    return (minilm_model if isinstance(config, MiniLMConfig) else qwen2).abstract_params(config)


def _shapes(config: EncoderConfig, dtype: str) -> Any:
    if isinstance(config, MiniLMConfig):
        return nn.meta.unbox(_boxed(config))
    return stored_params(config, jnp.dtype(dtype))


def _shardings(config: EncoderConfig, dtype: str, layout: MeshLayout) -> Any:
    return layout.state_shardings(_shapes(config, dtype), parameter_axes(_boxed(config)))


def _at(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)
