"""Settings of the three parts of a model.

Letters in shape names: B batch, T context tokens, D context width, S scales, P side of a scale, L tokens over all
scales, C latent channels, V codebook size, W transformer width, H heads, K head width.
"""

import dataclasses
import itertools
from typing import Literal

from hart_jax.config.settings import Settings, require


def _check_patch_nums(patch_nums: tuple[int, ...]) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(patch_nums))
    require(
        len(patch_nums) >= 2 and increasing and patch_nums[0] >= 1,
        f"patch_nums={patch_nums}: needs two or more sides in tokens, increasing from 1 or more",
    )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Settings):
    """The hybrid tokenizer (SPEC.md section 1). Defaults are the released one's, at 256 px."""

    image_size: int = 256
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 32
    vocab_size: int = 4096
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    beta: float = 0.25

    def __post_init__(self) -> None:
        _check_patch_nums(self.patch_nums)
        require(
            len(self.channel_multipliers) >= 1 and min(self.channel_multipliers) >= 1,
            f"channel_multipliers={self.channel_multipliers}: needs one per level, each 1 or more",
        )
        side = self.patch_nums[-1] * self.downsampling
        require(
            side == self.image_size,
            f"patch_nums={self.patch_nums}: the last entry times the downsampling {self.downsampling} gives {side} px, "
            f"not image_size={self.image_size}; end patch_nums with {self.image_size // self.downsampling}",
        )
        widths = [self.channels * m for m in self.channel_multipliers]
        require(
            all(w >= 32 and w % 32 == 0 for w in widths),
            f"channels={self.channels}: every level's width {widths} must be a multiple of 32",
        )
        for name in ("res_blocks", "latent_channels", "vocab_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be 1 or more")
        require(self.share_quant_resi >= 0, f"share_quant_resi={self.share_quant_resi}: must be 0 or more")
        require(-1 <= self.quant_resi <= 1, f"quant_resi={self.quant_resi}: its absolute value is a ratio, at most 1")
        require(self.beta >= 0, f"beta={self.beta}: must be 0 or more")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def num_phi(self) -> int:
        """Number of phi convolutions: one per scale if `share_quant_resi` is 0."""
        return self.share_quant_resi or len(self.patch_nums)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(Settings):
    """The residual diffusion head (SPEC.md section 4)."""

    width: int = 1024
    depth: int = 6
    sampling_steps: int = 8
    batch_mul: int = 4

    def __post_init__(self) -> None:
        for name in ("width", "depth", "batch_mul"):
            require(getattr(self, name) >= 1, f"diffusion.{name}={getattr(self, name)}: must be 1 or more")
        require(2 <= self.sampling_steps <= 1000, f"diffusion.sampling_steps={self.sampling_steps}: must be in 2..1000")


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Settings):
    """The scale-wise autoregressive transformer (SPEC.md section 2). Defaults are the released 0.7B model's, at 256 px.

    `num_classes` > 0 makes it class-conditional: the context is one learned embedding of the label instead of text
    states (label `num_classes` is the unconditional one), as in VAR.
    """

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    latent_channels: int = 32
    context_tokens: int = 300
    context_dim: int = 1536
    num_classes: int = 0
    depth: int = 24
    width: int = 1536
    heads: int = 24
    mlp_ratio: float = 4.0
    attn_l2_norm: bool = False
    disable_aln: bool = True
    shared_aln: bool = False
    use_timestep_embed: bool = True
    sep_aln_pooling_mode: str = "max"
    use_context_norm: bool = True
    norm_eps: float = 1e-6
    diffusion: DiffusionConfig = DiffusionConfig()

    def __post_init__(self) -> None:
        _check_patch_nums(self.patch_nums)
        for name in ("vocab_size", "latent_channels", "context_tokens", "context_dim", "depth", "width", "heads"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("num_classes", "mlp_ratio", "norm_eps"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: must be 0 or more")
        require(self.width % self.heads == 0, f"width={self.width}: must be a multiple of heads={self.heads}")
        require(self.head_dim % 4 == 0, f"width/heads={self.head_dim}: the head width must be a multiple of 4 (rotary)")
        pooling = self.sep_aln_pooling_mode
        require(pooling in ("max", "avg"), f"sep_aln_pooling_mode={pooling!r}: must be 'max' or 'avg'")
        shared_without_own = self.disable_aln or not self.shared_aln
        require(
            shared_without_own,
            "shared_aln=True needs disable_aln=True: the shared table replaces the blocks' own AdaLN",
        )
        if self.num_classes:
            require(self.context_tokens == 1, f"context_tokens={self.context_tokens}: a class-conditional model has 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio * 2 / 3 + 255) // 256 * 256

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied with; normed queries carry a learned scale instead."""
        return 1.0 if self.attn_l2_norm else 0.25 / self.head_dim**0.5

    @property
    def num_tokens(self) -> int:
        """L: tokens over all scales."""
        return sum(p * p for p in self.patch_nums)

    @property
    def adaln(self) -> Literal["none", "shared", "own"]:
        """Where a block takes its modulation from."""
        if not self.disable_aln:
            return "own"
        return "shared" if self.shared_aln else "none"


def check_fit(tokenizer: TokenizerConfig, transformer: TransformerConfig) -> None:
    """Raises `UserError` unless the transformer predicts this tokenizer's tokens."""
    for name in ("patch_nums", "vocab_size", "latent_channels"):
        ours, theirs = getattr(transformer, name), getattr(tokenizer, name)
        require(ours == theirs, f"transformer.{name}={ours} does not match tokenizer.{name}={theirs}")
