"""Qwen2, a causal language model, up to its last hidden states: HART's text encoder (SPEC.md section 2).

Source: Yang et al., arXiv 2407.10671 (Qwen2); Wang et al., arXiv 2409.12191 (Qwen2-VL, whose language model it is too:
on text alone its three rotary sections have equal positions). Blocks are pre-norm, with grouped-query attention, biases
on query, key and value only, and SwiGLU.

Letters: B prompts, T tokens, P tokens of a prefix that all prompts share, M = P + T keys, L layers, W width, H heads,
G groups of R = H / G heads that share keys and values, K channels per head, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hart_jax.errors import UserError
from hart_jax.nn.layers import RMSNorm, dense, lookup_rows, shard_batch
from hart_jax.nn.rotary import apply_rotary, rotary_cos_sin


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Sizes of a Qwen2, by their names in a published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = int if field.type is int else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
                raise UserError(f"text encoder: {field.name} is {value!r}; it must be a positive number")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise UserError(
                f"text encoder: hidden_size {self.hidden_size} is not an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"text encoder: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "Qwen2Config":
        """The config of a published config.json; `UserError` for a setting under which Qwen2 computes something else.

        Newer files of Qwen2-VL have the language model's settings under `text_config`.
        """
        if values.get("quantization_config"):
            raise UserError(f"{where}: quantization_config is set; only weights that are not quantized are supported")
        nested = values.get("text_config")
        if isinstance(nested, Mapping):
            values, where = nested, f"{where}: text_config"
        values = {**values, "rope_theta": _rope_theta(values, where)}
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values.get("num_attention_heads")
        fields = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in fields if values.get(name) is None]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} is missing")
        try:
            config = cls(**{name: values[name] for name in fields})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        _check_computation(values, config, where)
        return config


def _rope_theta(values: Mapping[str, Any], where: str) -> Any:
    theta = values.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        if not isinstance(rope, Mapping):
            raise UserError(f"{where}: {name} is {rope!r}; it must be a JSON object or null")
        kinds = {rope[key] for key in ("type", "rope_type") if rope.get(key) is not None}
        if kinds - {"default", "mrope"}:
            raise UserError(
                f"{where}: {name} has the type {', '.join(sorted(kinds))}; only default and mrope are known"
            )
        unknown = set(rope) - {"type", "rope_type", "rope_theta", "mrope_section"}
        if unknown:
            raise UserError(f"{where}: {name}.{min(unknown)} is set; plain rotary positions have no such setting")
        theta = rope.get("rope_theta", theta)
    return theta


def _check_computation(values: Mapping[str, Any], config: Qwen2Config, where: str) -> None:
    fixed = {"hidden_act": "silu", "head_dim": config.head_dim}
    for name, value in fixed.items():
        if values.get(name) not in (None, value):
            raise UserError(f"{where}: {name} is {values[name]!r}; only {value!r} is supported")
    first_sliding = values.get("max_window_layers", 0)
    if values.get("use_sliding_window") and values.get("sliding_window") and first_sliding < config.num_hidden_layers:
        raise UserError(f"{where}: use_sliding_window is true; only full attention is supported")
    others = set(values.get("layer_types") or ()) - {"full_attention"}
    if others:
        raise UserError(f"{where}: layer_types has {min(others)!r}; only 'full_attention' is supported")


# The published text encoder of HART.
QWEN2_1P5B = Qwen2Config(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
)


class KeyValues(NamedTuple):
    """Rotated keys and values of a prefix in every layer, (L, B or 1, P, G, K) each."""

    keys: jax.Array | np.ndarray
    values: jax.Array | np.ndarray


def no_prefix(config: Qwen2Config, dtype: jnp.dtype) -> KeyValues:
    """Keys and values of no tokens."""
    empty = np.zeros((config.num_hidden_layers, 1, 0, config.num_key_value_heads, config.head_dim), dtype)
    return KeyValues(empty, empty)


class Qwen2(nn.Module):
    """Qwen2 without its output layer; `dtype` is the compute type."""

    config: Qwen2Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, mask_BT: jax.Array, prefix: KeyValues) -> tuple[jax.Array, KeyValues]:
        """Last hidden states_BTW after the final norm (float32), and the tokens' own keys and values.

        A token attends to the prefix, and to itself and tokens before it where their mask is not 0. Its position is its
        place after the prefix, whatever is masked. Masked tokens have states as well; a token to which every key is
        masked averages the values of all M, later ones included, as the reference does.
        """
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table_VW = self.param("embedding", init, (config.vocab_size, config.hidden_size))
        x_BTW = lookup_rows(table_VW, input_ids_BT).astype(self.dtype)
        start, length = prefix.keys.shape[2], input_ids_BT.shape[1]
        causal_TT = np.tri(length, dtype=bool)
        visible_BTM = jnp.pad(causal_TT & (mask_BT[:, None] > 0), ((0, 0), (0, 0), (start, 0)), constant_values=True)
        cos_sin_1T2K = rotary_cos_sin(jnp.asarray(_angles(np.arange(start, start + length), config)[None]))
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, self.dtype, name="layers")
        x_BTW, own = layers(x_BTW, visible_BTM, cos_sin_1T2K, prefix)
        return RMSNorm(config.rms_norm_eps, "norm", name="norm")(x_BTW).astype(jnp.float32), own


def _angles(position_T: np.ndarray, config: Qwen2Config) -> np.ndarray:
    # In float32 step by step, as the reference: at position 400 the order shows.
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    angle = position_T[:, None].astype(np.float32) * (1 / np.float32(config.rope_theta) ** exponents)
    return np.concatenate([angle, angle], axis=-1)


class _Layer(nn.Module):
    config: Qwen2Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_BTW: jax.Array, visible_BTM: jax.Array, cos_sin_1T2K: jax.Array, prefix: KeyValues
    ) -> tuple[jax.Array, KeyValues]:
        config = self.config
        linear = functools.partial(dense, dtype=self.dtype)
        norm = functools.partial(RMSNorm, config.rms_norm_eps, "norm")
        (rows, length, width), channels = x_BTW.shape, config.head_dim
        h_BTW = norm(name="attention_norm")(x_BTW)
        q_BTHK, k_BTGK, v_BTGK = (
            linear(heads * channels, ("embed", axis), name=name)(h_BTW).reshape(rows, length, heads, channels)
            for name, heads, axis in (
                ("query", config.num_attention_heads, "heads"),
                # Few and small: whole on every device, so that no head is cut.
                ("key", config.num_key_value_heads, "key_value_heads"),
                ("value", config.num_key_value_heads, "key_value_heads"),
            )
        )
        own = KeyValues(apply_rotary(k_BTGK, cos_sin_1T2K), v_BTGK)
        k_BMGK, v_BMGK = (
            jnp.concatenate([jnp.broadcast_to(before, (rows, *before.shape[1:])), after], axis=1)
            for before, after in zip(prefix, own, strict=True)
        )
        q_BTGRK = apply_rotary(q_BTHK, cos_sin_1T2K).reshape(rows, length, config.num_key_value_heads, -1, channels)
        logits_BGRTM = jnp.einsum("btgrk,bmgk->bgrtm", q_BTGRK, k_BMGK, preferred_element_type=jnp.float32)
        logits_BGRTM *= channels**-0.5
        logits_BGRTM = jnp.where(visible_BTM[:, None, None], logits_BGRTM, jnp.finfo(jnp.float32).min)
        weights_BGRTM = jax.nn.softmax(logits_BGRTM).astype(self.dtype)
        seen_BTW = jnp.einsum("bgrtm,bmgk->btgrk", weights_BGRTM, v_BMGK).reshape(rows, length, width)
        out_BTW = linear(width, ("heads", "embed"), bias=False, name="attention_out")(seen_BTW)
        x_BTW = shard_batch(x_BTW + out_BTW)
        h_BTW = norm(name="mlp_norm")(x_BTW)
        gate_BTF, up_BTF = (
            linear(config.intermediate_size, ("embed", "mlp"), bias=False, name=name)(h_BTW) for name in ("gate", "up")
        )
        mlp_BTW = linear(width, ("mlp", "embed"), bias=False, name="down")(nn.silu(gate_BTF) * up_BTF)
        return shard_batch(x_BTW + mlp_BTW), own


@functools.cache
def abstract_params(config: Qwen2Config) -> Mapping[str, Any]:
    """Boxed shapes of the parameters of `Qwen2(config)`; nothing is allocated."""
    tokens_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    prefix = no_prefix(config, jnp.dtype(jnp.float32))
    return jax.eval_shape(Qwen2(config).init, jax.random.key(0), tokens_BT, tokens_BT, prefix)["params"]
