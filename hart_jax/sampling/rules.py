"""Rules of sampling: which codes stay, how strong guidance is, what an iteration fills (SPEC.md section 3)."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.config import FLOAT32_END, SampleConfig, Shape, TransformerConfig


def keep_top(logits_V: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits (..., V) with -inf outside the `top_k` largest (0: all) and the nucleus of mass `top_p` (1: all)."""
    if 0 < top_k < logits_V.shape[-1]:
        logits_V = keep_largest(logits_V, top_k)
    return keep_nucleus(logits_V, 1 - top_p) if top_p < 1 else logits_V


def keep_largest(logits_V: jax.Array, k: int | jax.Array) -> jax.Array:
    """Logits (..., V) with -inf outside the `k` largest, 1..V."""
    return jnp.where(logits_V < kth_largest(logits_V, k), -jnp.inf, logits_V)


def keep_nucleus(logits_V: jax.Array, tail: float | jax.Array) -> jax.Array:
    """Logits (..., V) with -inf at the least likely codes, which have a mass of at most `tail` together."""
    ascending = jnp.sort(logits_V, axis=-1)
    outside = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= tail
    # The largest always stays; the smallest that stays is the threshold.
    outside = outside.at[..., -1].set(False)
    threshold = jnp.min(jnp.where(outside, jnp.inf, ascending), axis=-1, keepdims=True)
    return jnp.where(logits_V < threshold, -jnp.inf, logits_V)


def kth_largest(x_V: jax.Array, k: int | jax.Array) -> jax.Array:
    """The k-th largest of float32 values (..., V), exactly, as (..., 1): found bit by bit, where sorting costs more."""
    bits = jax.lax.bitcast_convert_type(x_V.astype(jnp.float32), jnp.int32)
    # As unsigned integers in the order of the floats.
    ordered = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def add_bit(at, found):
        candidate = found | (jnp.uint32(1) << (31 - at).astype(jnp.uint32))
        enough = jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= k
        return jnp.where(enough, candidate, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((*x_V.shape[:-1], 1), jnp.uint32))
    found = jax.lax.bitcast_convert_type(found, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ jnp.int32(-(2**31)), ~found), jnp.float32)


def iteration_sizes(positions: int, iterations: int) -> list[int]:
    """How many of the last scale's positions each masked iteration fills."""
    left, sizes = positions, []
    for iteration in range(iterations):
        later = int(np.floor(positions * np.cos(np.pi / 2 * (iteration + 1) / iterations)))
        later = 0 if iteration == iterations - 1 else max(1, min(left - 1, later))
        sizes.append(left - later)
        left = later
    return sizes


def progress(scale: int, scales: int) -> float:
    """0..1 over the scales; at the last one it stays what it was."""
    return min(scale, scales - 2) / (scales - 1)


def growing_guidance(settings: SampleConfig, scale: int, scales: int) -> float:
    """t in (1 + t) cond - t uncond: none at the first scale, almost `cfg` at the last."""
    return settings.cfg * progress(scale, scales)


def iterations_of_the_last(settings: SampleConfig, scale: int, scales: int) -> int:
    """`masked_iterations` at the last scale, one at the others."""
    return settings.masked_iterations if scale == scales - 1 else 1


@dataclasses.dataclass(frozen=True)
class Rules:
    """What of sampling is a rule rather than a number: HART's, unless another is given.

    `guidance` gives t in (1 + t) cond - t uncond, and `iterations` in how many steps a scale's positions are filled, at
    least 1, at most as many as there are; both are asked with (settings, scale, scales). Of a list that is not the
    model's `patch_nums`, `guidance` is asked with the scale there that each one stands for: scales of one size are
    guided alike. `negative` is the condition in place of nothing: text states (1, T, D) and mask (1, T) with the
    model's T, or a label (1,).
    """

    guidance: Callable[[SampleConfig, int, int], float] = growing_guidance
    iterations: Callable[[SampleConfig, int, int], int] = iterations_of_the_last
    negative: Any = None

    def guidance_of(self, settings: SampleConfig, config: TransformerConfig) -> np.ndarray:
        """t of each scale, float64; `ValueError` for what is no finite number."""
        found = [self.guidance(settings, level, config.num_levels) for level in config.each_level]
        for scale, t in enumerate(found):
            if np.ndim(t) or np.asarray(t).dtype.kind not in "iuf" or not abs(t) < FLOAT32_END:
                raise ValueError(f"rules.guidance gives {t!r} for scale {scale}: give a finite number (float32)")
        return np.array(found, np.float64)

    def iterations_of(self, settings: SampleConfig, shapes: Sequence[Shape]) -> list[int]:
        """Iterations of each scale; `ValueError` for what is no whole number, or more than there are positions."""
        found = []
        for scale, shape in enumerate(shapes):
            given = self.iterations(settings, scale, len(shapes))
            try:
                found.append(operator.index(given))
            except TypeError:
                raise ValueError(f"rules.iterations gives {given!r} for scale {scale}: give a whole number") from None
            if not 1 <= found[-1] <= math.prod(shape):
                raise ValueError(f"rules.iterations gives {given} for a scale of {shape[0]} x {shape[1]} positions")
        return found

    def check_negative(self, config: TransformerConfig) -> None:
        """Raises `ValueError` where the negative condition is not one of this model."""
        if self.negative is None:
            return
        if config.num_classes:
            label, last = self.negative, config.num_classes - 1
            is_label = isinstance(label, np.ndarray | jax.Array) and label.shape == (1,) and label.dtype.kind in "iu"
            if not is_label or not (isinstance(label, jax.core.Tracer) or 0 <= int(label[0]) <= config.num_classes):
                raise ValueError(f"rules.negative={label!r}: of this model it is a label, an array (1,) of 0 to {last}")
            return
        tokens, width = config.context_tokens, config.context_dim
        pair = self.negative if isinstance(self.negative, tuple | list) else (self.negative,)
        found, wanted = [np.shape(part) for part in pair], [(1, tokens, width), (1, tokens)]
        if found != wanted:
            raise ValueError(
                f"rules.negative has the shapes {found}: of this model it is text states {wanted[0]} and a mask "
                f"{wanted[1]}, as `conditioner_of` gives them for one prompt"
            )


HART_RULES = Rules()


# The settings that are numbers of a compiled sampler.
NUMBERS = ("cfg", "temperature", "top_k", "top_k_late", "late_scale", "top_p")


@flax.struct.dataclass
class SampleNumbers:
    """The settings `NUMBERS` as arrays, which a compiled sampler takes: other values compile nothing.

    `guidance` (S, 2) float32 is 1 + t and t of each scale (`guide`), `temperature` float32, `top_k` (S,) int32 how many
    codes stay at each scale, or None for all everywhere, `tail` float32 the mass outside the nucleus, or None for none.
    """

    guidance_S2: Any
    temperature: Any
    top_k_S: Any
    tail: Any

    @classmethod
    def of(cls, settings: SampleConfig, rules: Rules, config: TransformerConfig) -> "SampleNumbers":
        t_S = rules.guidance_of(settings, config)
        top_k = [settings.top_k if level < settings.late_scale else settings.top_k_late for level in config.each_level]
        top_k_S = np.array([k or config.vocab_size for k in top_k], np.int32)
        return cls(
            np.stack([1 + t_S, t_S], axis=1).astype(np.float32),
            np.float32(settings.temperature),
            top_k_S if any(top_k) else None,
            np.float32(1 - settings.top_p) if settings.top_p < 1 else None,
        )
