"""One transformer block, and the key-value cache that sampling keeps (SPEC.md section 2)."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import TransformerConfig
from hart_jax.nn.layers import add_bias, dense, matmul, rms_norm, width_init
from hart_jax.nn.rotary import apply_rotary
from hart_jax.transformer.attention import attention
from hart_jax.transformer.mask import DenseMask
from pallas_kernels.attention import Segments

MAX_SCALE_MUL = float(np.log(100.0))


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, preallocated, (layers, B, M, H * K); rotary positions are applied already.

    Heads lie side by side, as a TPU would fill each up to 128 lanes.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def empty(cls, config: TransformerConfig, batch: int, length: int, dtype: jnp.dtype) -> "KVCache":
        shape = (config.depth, batch, length, config.width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)).placed()

    def placed(self) -> "KVCache":
        """Split over the devices as the keys and values of a block are."""
        axes = (None, "batch", None, "heads")
        return KVCache(nn.with_logical_constraint(self.k, axes), nn.with_logical_constraint(self.v, axes))

    def append(self, start: int, new: "KVCache") -> "KVCache":
        """With `new` (layers, B, Q, H * K) written at positions start..."""
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=2)
        return KVCache(write(self.k, new.k.astype(self.k.dtype)), write(self.v, new.v.astype(self.v.dtype)))

    def read(self, layer: jax.Array, end: int) -> "KVCache":
        """Those of one layer before position `end`, (B, end, H * K)."""
        _, batch, _, width = self.k.shape
        at, size = (layer, 0, 0, 0), (1, batch, end, width)
        return KVCache(jax.lax.dynamic_slice(self.k, at, size)[0], jax.lax.dynamic_slice(self.v, at, size)[0])


class SelfAttention(nn.Module):
    """Multi-head attention; bias on q and v only."""

    config: TransformerConfig
    dtype: jnp.dtype | None = None
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, x_BQW: jax.Array, cos_sin_BQ2K: jax.Array, segments: Segments | DenseMask | None, cached
    ) -> tuple:
        """`cached` is None, or (cache, layer, start): then the keys are the cache before `start` and the queries', and
        the queries' own keys and values are the second result, a `KVCache` of one layer, (B, Q, H * K)."""
        cfg, zeros = self.config, nn.initializers.zeros
        kernel_init = nn.with_logical_partitioning(width_init(cfg.width), ("embed", None, "heads", "head_dim"))
        kernel = self.param("qkv", kernel_init, (cfg.width, 3, cfg.heads, cfg.head_dim))
        bias_init = nn.with_logical_partitioning(zeros, ("heads", "head_dim"))
        q_bias = self.param("q_bias", bias_init, (cfg.heads, cfg.head_dim))
        v_bias = self.param("v_bias", bias_init, (cfg.heads, cfg.head_dim))
        qkv = matmul("bqw,wnhk->bqnhk", x_BQW, kernel)
        q, k, v = add_bias(qkv[:, :, 0], q_bias), qkv[:, :, 1], add_bias(qkv[:, :, 2], v_bias)
        if cfg.attn_l2_norm:
            start = nn.with_logical_partitioning(nn.initializers.constant(np.log(4.0)), ("heads",))
            scale_mul = jnp.exp(jnp.minimum(self.param("scale_mul", start, (cfg.heads,)), MAX_SCALE_MUL))
            q = _unit(q) * scale_mul[:, None].astype(q.dtype)
            k = _unit(k)
        q, k = apply_rotary(q, cos_sin_BQ2K), apply_rotary(k, cos_sin_BQ2K)
        q, k, v = (nn.with_logical_constraint(x, ("batch", None, "heads", None)) for x in (q, k, v))
        new = None
        if cached is not None:
            cache, layer, start = cached
            before = cache.read(layer, start)
            new = KVCache(*(x.reshape(*x.shape[:2], cfg.width) for x in (k, v)))
            k, v = (
                jnp.concatenate([old.reshape(len(x), start, *x.shape[2:]).astype(x.dtype), x], axis=1)
                for old, x in ((before.k, k), (before.v, v))
            )
        # Kept only where "intermediates" are asked for.
        self.sow("intermediates", "queries_keys", (q, k))
        out = attention(q, k, v, kv_end=segments, scale=cfg.attention_scale, implementation=self.attention)
        out = out.reshape(*x_BQW.shape[:2], cfg.width)
        init = width_init(cfg.width, (2 * cfg.depth) ** -0.5)
        return dense(cfg.width, ("heads_out", "embed"), init=init, dtype=self.dtype, name="proj")(out), new


def _unit(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(x32 * x32, -1, keepdims=True))
    return (x32 / jnp.maximum(length, 1e-12)).astype(x.dtype)


class SwiGLU(nn.Module):
    config: TransformerConfig
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, init = self.config, width_init(self.config.width)
        gate = dense(cfg.mlp_width, ("embed", "mlp"), init=init, bias=False, dtype=self.dtype, name="gate")(x)
        up = dense(cfg.mlp_width, ("embed", "mlp"), init=init, bias=False, dtype=self.dtype, name="up")(x)
        hidden = nn.with_logical_constraint(nn.silu(gate) * up, ("batch", None, "mlp"))
        return dense(cfg.width, ("mlp", "embed"), init=init, bias=False, dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """x += attn(norm(x)); x += mlp(norm(x)): one norm weight for both, modulated where the config has AdaLN.

    A scan body: the carry is x, `layer` its index; the second result is `SelfAttention`'s. The cache is only read: were
    it written here, in the loop, a TPU's program would copy that of all layers for every layer.
    """

    config: TransformerConfig
    segments: Segments | DenseMask | None = None
    cache_start: int = 0
    dtype: jnp.dtype | None = None
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x_BQW: jax.Array,
        layer: jax.Array,
        cos_sin_BQ2K: jax.Array,
        pooled_BW: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        cfg = self.config
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("embed",))
        weight = self.param("norm_scale", ones, (cfg.width,))
        modulation = self._modulation(pooled_BW)

        def normed(x, which):
            x = rms_norm(x, weight, cfg.norm_eps)
            if modulation is None:
                return x
            return (x * (1 + modulation["scale"][which]) + modulation["shift"][which]).astype(x.dtype)

        def gated(x, which):
            return x if modulation is None else (x * modulation["gamma"][which]).astype(x.dtype)

        cached = None if cache is None else (cache, layer, self.cache_start)
        attend = SelfAttention(cfg, self.dtype, self.attention, name="attn")
        out, new = attend(normed(x_BQW, 0), cos_sin_BQ2K, self.segments, cached)
        x_BQW = x_BQW + gated(out, 0)
        x_BQW = x_BQW + gated(SwiGLU(cfg, self.dtype, name="mlp")(normed(x_BQW, 1)), 1)
        x_BQW = nn.with_logical_constraint(x_BQW, ("batch", None, "embed"))
        return x_BQW, new

    def _modulation(self, pooled_BW: jax.Array | None) -> dict[str, jax.Array] | None:
        """gamma, scale and shift, each (2, B, 1, W) float32: for attention and MLP."""
        cfg = self.config
        if pooled_BW is None:
            return None
        if cfg.adaln == "own":
            out = dense(6 * cfg.width, (None, "embed"), init=_adaln_init(cfg.width), dtype=self.dtype, name="ada_lin")
            rows = out(nn.silu(pooled_BW)).reshape(-1, 6, cfg.width)
        else:
            init = nn.with_logical_partitioning(nn.initializers.normal(cfg.width**-0.5), (None, "embed"))
            rows = self.param("scale_shift_table", init, (6, cfg.width)) + pooled_BW[:, None]
        rows = jnp.moveaxis(rows.astype(jnp.float32), 1, 0)[:, :, None]
        return {"gamma": rows[0:2], "scale": rows[2:4], "shift": rows[4:6]}


def _adaln_init(width: int):
    """Truncated normal; gates start at almost nothing, scales and shifts at half (VAR)."""

    def init(key, shape, dtype=jnp.float32):
        kernel = width_init(width)(key, shape, dtype)
        return kernel * jnp.where(jnp.arange(shape[-1]) < 2 * width, 1e-5, 0.5)

    return init
