"""MiniLM, a small BERT, up to its last hidden states: the text encoder of the bundled model.

Source: Devlin et al., arXiv 1810.04805 (BERT); Wang et al., arXiv 2002.10957 (MiniLM). Blocks are post-norm, with exact
GELU; the pooler is not used. Letters as in `hart_jax.text.encoder` (here N = T), and L layers, W width, H heads.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hart_jax.errors import UserError
from hart_jax.nn.layers import lookup_rows, shard_batch


@dataclasses.dataclass(frozen=True)
class MiniLMConfig:
    """Sizes of a BERT encoder, by their names in a published config.json."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or value <= 0:
                raise UserError(f"text encoder: {name} is {value!r}; it must be a positive number")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"text encoder: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "MiniLMConfig":
        """The config of a published config.json; other settings of that file must be those this encoder computes."""
        fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, value in fixed.items():
            if values.get(name, value) != value:
                raise UserError(f"{where}: {name} is {values[name]!r}; only {value!r} is supported")
        fields = cls.__dataclass_fields__
        missing = [name for name in fields if name not in values]
        if missing:
            raise UserError(f"{where}: {', '.join(missing)} is missing")
        return cls(**{name: values[name] for name in fields})


class MiniLM(nn.Module):
    """BERT without its pooler."""

    config: MiniLMConfig

    @nn.compact
    def __call__(self, input_ids_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """Last hidden states_BTW (float32); positions with mask 0 are not attended to."""
        config = self.config
        word_VW = _table("word_embedding", self, config.vocab_size, "vocab")
        position_PW = _table("position_embedding", self, config.max_position_embeddings, "position")
        type_KW = _table("type_embedding", self, config.type_vocab_size, "type")
        x_BTW = lookup_rows(word_VW, input_ids_BT) + position_PW[: input_ids_BT.shape[1]] + type_KW[0]
        x_BTW = shard_batch(_norm(config, "embedding_norm")(x_BTW))
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config, name="layers")
        x_BTW, _ = layers(x_BTW, mask_BT)
        return x_BTW


class _Layer(nn.Module):
    config: MiniLMConfig

    @nn.compact
    def __call__(self, x_BTW: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, None]:
        config = self.config
        heads = (*x_BTW.shape[:2], config.num_attention_heads, -1)
        q_BTHK, k_BTHK, v_BTHK = (
            _dense(config.hidden_size, ("embed", "heads"), name)(x_BTW).reshape(heads)
            for name in ("query", "key", "value")
        )
        logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / math.sqrt(q_BTHK.shape[-1])
        logits_BHTS = jnp.where(mask_BT[:, None, None, :] > 0, logits_BHTS, jnp.finfo(jnp.float32).min)
        seen_BTHK = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits_BHTS), v_BTHK)
        attended_BTW = _dense(config.hidden_size, ("heads", "embed"), "attention_out")(seen_BTHK.reshape(x_BTW.shape))
        x_BTW = shard_batch(_norm(config, "attention_norm")(x_BTW + attended_BTW))
        hidden_BTF = _dense(config.intermediate_size, ("embed", "mlp"), "mlp_in")(x_BTW)
        mlp_BTW = _dense(config.hidden_size, ("mlp", "embed"), "mlp_out")(nn.gelu(hidden_BTF, approximate=False))
        return shard_batch(_norm(config, "mlp_norm")(x_BTW + mlp_BTW)), None


def _table(name: str, module: MiniLM, rows: int, axis: str) -> jax.Array:
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
    return jnp.asarray(module.param(name, init, (rows, module.config.hidden_size)))


def _dense(features: int, axes: tuple[str, str], name: str) -> nn.Dense:
    return nn.Dense(
        features,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


def _norm(config: MiniLMConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        config.layer_norm_eps,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


@functools.cache
def abstract_params(config: MiniLMConfig) -> Mapping[str, Any]:
    """Boxed shapes of the parameters of `MiniLM(config)`; nothing is allocated."""
    tokens_BT = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(MiniLM(config).init, jax.random.key(0), tokens_BT, tokens_BT)["params"]
