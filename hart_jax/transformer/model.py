"""The scale-wise autoregressive transformer with its residual diffusion head (SPEC.md section 2).

One module holds all parameters; its methods are the pieces that training and sampling put together.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hart_jax.config import TransformerConfig
from hart_jax.diffusion.head import DiffusionHead
from hart_jax.diffusion.schedule import DIFFUSION, Objective
from hart_jax.nn.layers import MATMUL_OUTPUT, RMSNorm, TimestepEmbed, dense, shard_batch, width_init
from hart_jax.nn.rotary import context_angles, image_angles, rotary_cos_sin
from hart_jax.transformer.block import Block, KVCache
from hart_jax.transformer.mask import SCALE_CAUSAL, DenseMask, Mask
from pallas_kernels.attention import Segments

# What is kept of a block's forward pass: all of it; the results of its weights' products; nothing but its input.
REMAT = {"none": None, "dots": jax.checkpoint_policies.save_only_these_names(MATMUL_OUTPUT), "full": None}


class Context(flax.struct.PyTreeNode):
    """The condition as the transformer holds it.

    `tokens` (B, T, W) are the embedded states, `pooled` (B, W) what the blocks' AdaLN sees (None without), `head_scale`
    and `head_shift` (B, 1, W) the head's modulation, `positions` (B, T) position ids.
    """

    tokens: jax.Array
    pooled: jax.Array | None
    head_scale: jax.Array
    head_shift: jax.Array
    positions: jax.Array

    @property
    def last_position(self) -> jax.Array:
        """(B, 1): where the image's positions start."""
        return self.positions[:, -1:]


@flax.struct.dataclass
class TrainOutput:
    """`logits` (B, 1 + ..., V) of every position that predicts a token, the kept ones of the last scale at the end;
    `last_hidden` (B, N, W), the last block's output at those."""

    logits: jax.Array
    last_hidden: jax.Array


class Hart(nn.Module):
    """See `TransformerConfig`; `dtype` is the compute type, parameters are float32.

    `remat`, a key of `REMAT`, says what of each block is computed again in the backward pass to save memory;
    `attention`, one of `pallas_kernels.attention.IMPLEMENTATIONS`, how attention is computed; `unroll` compiles every
    block by itself, where one program is otherwise repeated for all. `mask` says who sees whom, `objective` how the
    residual is learned and sampled: HART's own, unless an idea is tried.
    """

    config: TransformerConfig
    dtype: jnp.dtype | None = None
    remat: str = "none"
    attention: str = "auto"
    unroll: bool = False
    mask: Mask = SCALE_CAUSAL
    objective: Objective = DIFFUSION

    def setup(self):
        cfg = self.config
        weights = width_init(cfg.width)
        if cfg.num_classes:
            init = nn.with_logical_partitioning(weights, ("classes", "embed"))
            # One more row: the unconditional class.
            self.class_embed = self.param("class_embed", init, (cfg.num_classes + 1, cfg.width))
            start = nn.with_logical_partitioning(weights, (None, "embed"))
            self.start = self.param("start", start, (1, cfg.width))
        else:
            if cfg.use_context_norm:
                self.context_norm = RMSNorm(cfg.norm_eps, axis="context")
            self.context_embed = dense(cfg.width, ("context", "embed"), init=weights, name="context_embed")
        self.word_embed = dense(cfg.width, ("latent", "embed"), init=weights, name="word_embed")
        if cfg.use_timestep_embed:
            self.level_embed = TimestepEmbed(cfg.width, "embed")
        else:
            init = nn.with_logical_partitioning(weights, ("scales", "embed"))
            self.level_table = self.param("level_table", init, (cfg.num_levels, cfg.width))
        self.head_norm = RMSNorm(cfg.norm_eps)
        self.head_ada_lin = dense(2 * cfg.width, (None, "embed"), init=width_init(cfg.width, 0.5), name="head_ada_lin")
        head_init = width_init(cfg.width, 0.02)
        self.head = dense(cfg.vocab_size, ("embed", "vocab"), init=head_init, name="head")
        self.decoder_norm = RMSNorm(cfg.norm_eps)
        self.diffusion_head = DiffusionHead(
            cfg.diffusion, cfg.latent_channels, self.dtype, self.remat != "none", self.unroll
        )

    def embed_text(self, text_BTD: jax.Array, mask_BT: jax.Array) -> Context:
        """The context of text states; `mask` is 1 for real tokens. Padding is not masked in attention (SPEC.md)."""
        if self.config.use_context_norm:
            text_BTD = self.context_norm(text_BTD)
        tokens_BTW = shard_batch(self.context_embed(text_BTD))
        pooled_BW = None
        if self.config.adaln != "none":
            largest = self.config.adaln == "own" and self.config.sep_aln_pooling_mode == "max"
            weight_BT1 = mask_BT[..., None].astype(tokens_BTW.dtype)
            mean_BW = jnp.sum(tokens_BTW * weight_BT1, 1) / jnp.maximum(1, weight_BT1.sum(1))
            pooled_BW = tokens_BTW.max(axis=1) if largest else mean_BW
        return self._context(tokens_BTW, pooled_BW, jnp.cumsum(mask_BT, axis=1) - 1)

    def embed_classes(self, label_B: jax.Array) -> Context:
        """The context of class labels; label `num_classes` is the unconditional one."""
        tokens_B1W = self.class_embed[label_B][:, None]
        pooled_BW = None if self.config.adaln == "none" else tokens_B1W[:, 0]
        context = self._context(tokens_B1W, pooled_BW, jnp.zeros((len(label_B), 1), jnp.int32))
        return context.replace(tokens=context.tokens + self.start)

    def embed_condition(self, condition: Any) -> Context:
        """The context of labels (B,) or of (text states (B, T, D), mask (B, T)), whichever the model has."""
        if self.config.num_classes:
            return self.embed_classes(condition)
        return self.embed_text(*condition)

    def _context(self, tokens_BTW: jax.Array, pooled_BW: jax.Array | None, positions_BT: jax.Array) -> Context:
        modulation = self.head_ada_lin(nn.silu(tokens_BTW.max(axis=1, keepdims=True)))
        head_scale, head_shift = jnp.split(modulation, 2, axis=-1)
        return Context(tokens_BTW, pooled_BW, head_scale, head_shift, positions_BT)

    def level(self, scale: int) -> jax.Array:
        """The level embedding (W,) of a scale; 0 is the context's."""
        level = self.config.level_of(scale)
        if self.config.use_timestep_embed:
            return self.level_embed(jnp.array([level]))[0]
        return self.level_table[level]

    def context_input(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Inputs (B, T, W) and rotations (B, T, 2, K) of the context positions (`rotary_cos_sin`)."""
        angle = context_angles(context.positions, self.config.head_dim)
        return (context.tokens + self.level(0)).astype(self.dtype or jnp.float32), rotary_cos_sin(angle)

    def scale_input(
        self, latent_BlC: jax.Array, scale: int, index_Bl: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array]:
        """Inputs (B, l, W) and rotations (B, l, 2, K) of the tokens `index` of a scale, from area(f_hat) there."""
        shapes = self.config.shapes
        x = self.word_embed(latent_BlC) + self.level(scale)
        angle = image_angles(index_Bl, shapes[scale], shapes[-1], context.last_position, self.config.head_dim)
        return x.astype(self.dtype or jnp.float32), rotary_cos_sin(angle)

    @nn.compact
    def blocks(
        self,
        x_BQW: jax.Array,
        cos_sin_BQ2K: jax.Array,
        pooled_BW: jax.Array | None,
        *,
        segments: Segments | DenseMask | None = None,
        cache: KVCache | None = None,
        cache_start: int = 0,
        keep: bool = True,
    ) -> tuple[jax.Array, KVCache | None]:
        """All blocks; `pooled` is the context's.

        With a cache, the keys are its first `cache_start` positions and the queries', which are written behind them if
        `keep`. `segments` says who sees whom; None: every query sees all.
        """
        body = Block
        if self.remat != "none":
            body = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.config.depth,
            unroll=self.config.depth if self.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = jnp.arange(self.config.depth)
        stack = scanned(self.config, segments, cache_start, self.dtype, self.attention, name="layers")
        x_BQW, new = stack(x_BQW, layers, cos_sin_BQ2K, pooled_BW, cache)
        return x_BQW, cache.append(cache_start, new) if cache and keep else cache

    def logits(self, x_BQW: jax.Array, context: Context) -> jax.Array:
        """(B, Q, V) float32 from the last block's output."""
        x = self.head_norm(x_BQW.astype(jnp.float32))
        logits = self.head(x * (1 + context.head_scale) + context.head_shift)
        return nn.with_logical_constraint(logits, ("batch", None, "vocab"))

    def residual_condition(self, x_BQW: jax.Array, code_BQC: jax.Array) -> jax.Array:
        """z, what the diffusion head sees: the last block's output and the code chosen there, normed."""
        return shard_batch(self.decoder_norm(x_BQW.astype(jnp.float32) + self.word_embed(code_BQC)))

    def denoise(self, x_NC: jax.Array, t_N: jax.Array, z_NW: jax.Array) -> jax.Array:
        """One call of the diffusion head's network."""
        return self.denoise_embedded(x_NC, t_N, self.embed_residual_condition(z_NW))

    def embed_residual_condition(self, z_NW: jax.Array) -> jax.Array:
        """What of the head's network depends on z alone, the same in all its steps."""
        return self.diffusion_head.embed(z_NW)

    def denoise_embedded(self, x_NC: jax.Array, t_N: jax.Array, embedded_NW: jax.Array) -> jax.Array:
        """`denoise`, of an embedded z."""
        return self.diffusion_head(x_NC, t_N, embedded_NW)

    def __call__(self, condition: Any, ar_input_BLC: jax.Array, kept_BN: jax.Array) -> TrainOutput:
        """Teacher forcing.

        Args:
          condition: labels, or text states and mask.
          ar_input_BLC: (B, L-1, C), inputs of scales 1.. as `Tokenizer.tokens` gives them.
          kept_BN: which last-scale tokens take part, ascending; the same number N in every sample.
        """
        cfg = self.config
        context = self.embed_condition(condition)
        inputs = [self.context_input(context)]
        sizes = cfg.sizes
        start = 0
        for scale in range(1, len(sizes)):
            latent = ar_input_BLC[:, start : start + sizes[scale]]
            start += sizes[scale]
            index_Bl = jnp.arange(sizes[scale])[None]
            if scale == len(sizes) - 1:
                index_Bl = kept_BN
                latent = jnp.take_along_axis(latent, kept_BN[..., None], axis=1)
            inputs.append(self.scale_input(latent, scale, index_Bl, context))
        x_BQW, cos_sin_BQ2K = (jnp.concatenate(part, axis=1) for part in zip(*inputs, strict=True))
        segments = self.mask.of_all(cfg.context_tokens, (*sizes[1:-1], kept_BN.shape[1]))
        x_BQW, _ = self.blocks(shard_batch(x_BQW), cos_sin_BQ2K, context.pooled, segments=segments)
        predicting = x_BQW[:, cfg.context_tokens - 1 :]
        output = TrainOutput(self.logits(predicting, context), x_BQW[:, -kept_BN.shape[1] :])
        if self.is_initializing():
            code = jnp.zeros((*output.last_hidden.shape[:2], cfg.latent_channels))
            z = self.residual_condition(output.last_hidden, code)
            self.denoise(code[:, 0], jnp.zeros(len(code), jnp.int32), z[:, 0])
        return output
