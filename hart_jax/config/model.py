"""Settings of the three parts of a model.

Letters in shape names: B batch, T context tokens, D context width, S scales, P tokens of a scale, L tokens over all
scales, C latent channels, V codebook size, W transformer width, H heads, K head width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

from hart_jax.config.scales import Scale, Shape, area_of, as_list, as_setting, nearest_levels, scale_shapes, shape_of
from hart_jax.config.settings import LATER, Settings, require


class HasScales:
    """What both networks say of their scales: `patch_nums` are a list's sides in tokens, (height, width) where a scale
    is no square.

    `levels` says of each scale which one of `patch_nums`, as the model has them, it stands for, whose level embedding
    and phi it takes; it is set by `of_list`, and empty where the list is the model's own.
    """

    patch_nums: tuple[Scale, ...]
    levels: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_nums", as_list(self.patch_nums, "patch_nums"))
        check_list(self.patch_nums, "patch_nums")
        if self.levels:
            rising = all(a <= b for a, b in itertools.pairwise(self.levels))
            require(
                rising and len(self.levels) == len(self.patch_nums) and self.levels[0] >= 0,
                f"levels={self.levels}: needs one for each of the {len(self.patch_nums)} patch_nums, rising from 0",
            )

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Height and width of each scale, in tokens."""
        return tuple(map(shape_of, self.patch_nums))

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(map(area_of, self.patch_nums))

    @property
    def num_tokens(self) -> int:
        """L: tokens over all scales."""
        return sum(self.sizes)

    @property
    def num_levels(self) -> int:
        """S of the model's own list."""
        return self.levels[-1] + 1 if self.levels else len(self.patch_nums)

    def level_of(self, scale: int) -> int:
        """Which scale of the model's own list `scale` stands for."""
        return self.each_level[scale]

    @property
    def each_level(self) -> tuple[int, ...]:
        """`level_of` each scale."""
        return self.levels or tuple(range(len(self.patch_nums)))

    def with_scales(self, patch_nums: Sequence[Scale], levels: tuple[int, ...] = ()) -> Self:
        """These settings with another list of scales."""
        return dataclasses.replace(cast(Any, self), patch_nums=tuple(patch_nums), levels=levels)

    def of_list(self, scales: Sequence[Scale]) -> Self:
        """These settings with another list, whose scales stand for those of this one that are nearest by side."""
        if tuple(scales) == self.patch_nums:
            return self.with_scales(scales, self.levels)
        return self.with_scales(scales, tuple(map(self.level_of, nearest_levels(scales, self.patch_nums))))

    def of_latent(self, height: int, width: int) -> Self:
        """These settings with the list of another latent: see `scale_shapes`, which says what it raises."""
        if self.shapes[-1] == (height, width):
            return self
        return self.with_scales(scale_shapes(self.patch_nums, height, width), self.levels)


def check_list(scales: Sequence[Scale], name: str) -> None:
    """Raises `UserError` for what is no list of scales."""
    shapes = list(map(shape_of, scales))
    increasing = all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in itertools.pairwise(shapes))
    require(
        len(shapes) >= 2 and increasing and min(shapes[0]) >= 1,
        f"{name}={tuple(scales)}: needs two or more sides in tokens, increasing from 1 or more",
    )


def check_ends(scales: Sequence[Scale], base: Sequence[Scale], name: str) -> None:
    """Raises `UserError` for what is no list from the first to the last scale of `base`."""
    check_list(scales, name)
    require(
        scales[0] == base[0] and scales[-1] == base[-1],
        f"{name}: {tuple(scales)} must begin with {base[0]} and end with {base[-1]}, as patch_nums does",
    )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(HasScales, Settings):
    """The hybrid tokenizer (SPEC.md section 1). Defaults are the released one's, at 256 px.

    `image_size` is the side of its images in pixels, (height, width) where they are no squares.
    """

    image_size: int | Shape = 256
    patch_nums: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 32
    vocab_size: int = 4096
    quant_resi: float = 0.5
    share_quant_resi: int = 4
    beta: float = 0.25
    levels: tuple[int, ...] = dataclasses.field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image_size", as_setting(shape_of(self.image_size)))
        require(
            len(self.channel_multipliers) >= 1 and min(self.channel_multipliers) >= 1,
            f"channel_multipliers={self.channel_multipliers}: needs one per level, each 1 or more",
        )
        factor, (height, width), (rows, columns) = self.downsampling, self.image_shape, self.shapes[-1]
        given, end = as_setting((factor * rows, factor * columns)), as_setting((height // factor, width // factor))
        require(
            given == self.image_size,
            f"patch_nums={self.patch_nums}: the last entry times the downsampling {factor} gives {given} px, "
            f"not image_size={self.image_size}; end patch_nums with {end}",
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
    def image_shape(self) -> Shape:
        """Height and width of an image in pixels."""
        return shape_of(self.image_size)

    @property
    def num_phi(self) -> int:
        """Number of phi convolutions: one per scale if `share_quant_resi` is 0."""
        return self.share_quant_resi or self.num_levels

    def with_scales(self, patch_nums: Sequence[Scale], levels: tuple[int, ...] = ()) -> Self:
        height, width = (self.downsampling * side for side in shape_of(patch_nums[-1]))
        return dataclasses.replace(self, patch_nums=tuple(patch_nums), levels=levels, image_size=(height, width))


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
class TransformerConfig(HasScales, Settings):
    """The scale-wise autoregressive transformer (SPEC.md section 2). Defaults are the released 0.7B model's, at 256 px.

    `num_classes` > 0 makes it class-conditional: the context is one learned embedding of the label instead of text
    states (label `num_classes` is the unconditional one), as in VAR.

    `scale_lists` are more lists that it is trained on beside `patch_nums`: each from the same first to the same last
    scale, with fewer scales than `patch_nums` and another number of them than the others, by which it is known.
    """

    patch_nums: tuple[Scale, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
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
    levels: tuple[int, ...] = dataclasses.field(default=(), metadata=LATER)
    scale_lists: tuple[tuple[Scale, ...], ...] = dataclasses.field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_scale_lists()
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

    def _check_scale_lists(self) -> None:
        lists = tuple(as_list(scales, "scale_lists") for scales in self.scale_lists)
        object.__setattr__(self, "scale_lists", lists)
        counts = [len(self.patch_nums)]
        for scales in lists:
            check_ends(scales, self.patch_nums, "scale_lists")
            count = len(scales)
            require(
                count < counts[0] and count not in counts,
                f"scale_lists: {scales} has {count} scales; give each list fewer than the {counts[0]} of "
                "patch_nums, and another number than the other lists",
            )
            counts.append(count)

    @property
    def lists(self) -> tuple[tuple[Scale, ...], ...]:
        """All lists that the model is trained on, `patch_nums` first."""
        return self.patch_nums, *self.scale_lists

    def with_scales(self, patch_nums: Sequence[Scale], levels: tuple[int, ...] = ()) -> Self:
        """These settings with another list of scales, and no more of them."""
        return dataclasses.replace(self, patch_nums=tuple(patch_nums), levels=levels, scale_lists=())

    def check_same(self, theirs: Self, source: str | Path, part: str) -> None:
        """As `Settings.check_same`, but for `scale_lists`: the same parameters may be trained on other lists."""
        ours, theirs = (dataclasses.replace(each, scale_lists=()) for each in (self, theirs))
        Settings.check_same(ours, theirs, source, part)

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
    def adaln(self) -> Literal["none", "shared", "own"]:
        """Where a block takes its modulation from."""
        if not self.disable_aln:
            return "own"
        return "shared" if self.shared_aln else "none"


def check_fit(tokenizer: TokenizerConfig, transformer: TransformerConfig) -> None:
    """Raises `UserError` unless the transformer predicts this tokenizer's tokens."""
    for name in ("patch_nums", "levels", "vocab_size", "latent_channels"):
        ours, theirs = getattr(transformer, name), getattr(tokenizer, name)
        require(ours == theirs, f"transformer.{name}={ours} does not match tokenizer.{name}={theirs}")
