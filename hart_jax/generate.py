"""From conditions to pictures: all scales, the residual, the decoder, one compiled function (SPEC.md section 3).

Classifier-free guidance doubles the batch: rows 0..B-1 are conditional, rows B..2B-1 unconditional.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.diffusion.schedule import sample_residual
from hart_jax.experiment import SampleConfig
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
from hart_jax.transformer.block import KVCache
from hart_jax.transformer.model import Context, Hart

Condition = Any  # (B,) labels, or text states (B, T, D) and mask (B, T)


@flax.struct.dataclass
class Generated:
    """Per scale, `indices` (B, p*p) and guided `logits` (B, p*p, V) before top-k and temperature; then the last latent
    `f_hat` (B, h, w, C) and `image` (B, H, W, 3) in [-1, 1]."""

    indices: tuple[jax.Array, ...]
    logits: tuple[jax.Array, ...]
    f_hat: jax.Array
    image: jax.Array


class Noise(Protocol):
    """Everything random in a generation."""

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        """Gumbel noise that chooses the indices."""
        ...

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        """Gumbel noise of smooth sampling."""
        ...

    def order(self, shape_Bl: tuple[int, ...]) -> jax.Array:
        """The order of the last scale's positions, a permutation per sample."""
        ...

    def init(self, shape_BlC: tuple[int, ...]) -> jax.Array:
        """Where the residual's diffusion starts."""
        ...

    def step(self, shape_SBlC: tuple[int, ...]) -> jax.Array | None:
        """Noise of its steps, or None for none."""
        ...


@flax.struct.dataclass
class KeyedNoise:
    """Noise that depends on each sample's own key alone, never on its batch."""

    keys_B: jax.Array

    @classmethod
    def of(cls, seed: int | jax.Array, indices_B: jax.Array) -> "KeyedNoise":
        """The noise of images number `indices` under `seed`."""
        return cls(jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices_B))

    def _draw(self, purpose: int, sampler: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.vmap(lambda key: sampler(jax.random.fold_in(key, purpose)))(self.keys_B)

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self._draw(2 * scale, lambda key: jax.random.gumbel(key, shape_BlV[1:]))

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self._draw(2 * scale + 1, lambda key: jax.random.gumbel(key, shape_BlV[1:]))

    def order(self, shape_Bl: tuple[int, ...]) -> jax.Array:
        return self._draw(1000, lambda key: jax.random.permutation(key, shape_Bl[1]))

    def init(self, shape_BlC: tuple[int, ...]) -> jax.Array:
        return self._draw(1001, lambda key: jax.random.normal(key, shape_BlC[1:]))

    def step(self, shape_SBlC: tuple[int, ...]) -> jax.Array:
        steps, _, *shape = shape_SBlC
        return jnp.swapaxes(self._draw(1002, lambda key: jax.random.normal(key, (steps, *shape))), 0, 1)


@flax.struct.dataclass
class GivenNoise:
    """Noise from arrays: `tokens` one (B, p*p, V) per scale, `start` (B, p*p, C), `steps` (S, B, p*p, C) or None."""

    tokens: tuple[jax.Array, ...]
    start: jax.Array | None = None
    steps: jax.Array | None = None

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self.tokens[scale].astype(jnp.float32)

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        raise ValueError("given noise has none for smooth sampling")

    def order(self, shape_Bl: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(shape_Bl[1]), shape_Bl)

    def init(self, shape_BlC: tuple[int, ...]) -> jax.Array:
        if self.start is None:
            raise ValueError("given noise lacks `start`, which the residual's diffusion begins with")
        return self.start

    def step(self, shape_SBlC: tuple[int, ...]) -> jax.Array | None:
        return self.steps


def with_unconditional(hart: Hart, condition: Condition) -> Condition:
    """The doubled condition: zero text with a mask of position 0 alone, or the label after the last class."""
    if hart.config.num_classes:
        return jnp.concatenate([condition, jnp.full_like(condition, hart.config.num_classes)])
    text_BTD, mask_BT = condition
    first_BT = jnp.zeros_like(mask_BT).at[:, 0].set(1)
    return jnp.concatenate([text_BTD, jnp.zeros_like(text_BTD)]), jnp.concatenate([mask_BT, first_BT])


def keep_top(logits_V: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits (..., V) with -inf outside the `top_k` largest (0: all) and the nucleus of mass `top_p` (1: all)."""
    if 0 < top_k < logits_V.shape[-1]:
        threshold = jax.lax.top_k(logits_V, top_k)[0][..., -1:]
        logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
    if top_p < 1:
        ascending = jnp.sort(logits_V, axis=-1)
        outside = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - top_p
        # The largest always stays; the smallest that stays is the threshold.
        outside = outside.at[..., -1].set(False)
        threshold = jnp.min(jnp.where(outside, jnp.inf, ascending), axis=-1, keepdims=True)
        logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
    return logits_V


def iteration_sizes(positions: int, iterations: int) -> list[int]:
    """How many of the last scale's positions each masked iteration fills."""
    left, sizes = positions, []
    for iteration in range(iterations):
        later = int(np.floor(positions * np.cos(np.pi / 2 * (iteration + 1) / iterations)))
        later = 0 if iteration == iterations - 1 else max(1, min(left - 1, later))
        sizes.append(left - later)
        left = later
    return sizes


def generate(
    hart: Hart,
    tokenizer: Tokenizer,
    params: dict[str, Any],
    condition: Condition,
    noise: Noise,
    settings: SampleConfig,
) -> Generated:
    """Draws one picture per condition.

    Args:
      params: {"transformer": ..., "tokenizer": ...}.
      condition: (B,) labels, or text states (B, T, D) and mask (B, T).
      noise: `KeyedNoise`, or given arrays.
    """
    run = _Run(hart, tokenizer, params, settings, noise)
    doubled = with_unconditional(hart, condition)
    context = run.hart("embed_condition", doubled)
    sides, batch = hart.config.patch_nums, len(context.tokens) // 2
    last = len(sides) - 1
    cache = KVCache.empty(
        hart.config, 2 * batch, hart.config.context_tokens + hart.config.num_tokens - 1, hart.dtype or jnp.float32
    )
    x, angle = run.hart("context_input", context)
    hidden, cache = run.hart("blocks", x, angle, context, cache=cache, cache_start=0)
    hidden, filled = hidden[:, -1:], hart.config.context_tokens
    f_hat = jnp.zeros((batch, sides[-1], sides[-1], hart.config.latent_channels))
    indices, logits = [], []
    for scale in range(last):
        if scale:
            x, angle = run.scale_input(f_hat, scale, context)
            hidden, cache = run.hart("blocks", x, angle, context, cache=cache, cache_start=filled)
            filled += x.shape[1]
        index, code, guided = run.choose(hidden, context, scale, run.token_noise(scale, batch))
        f_hat = f_hat + run.tokenizer("contribution", code, scale)
        indices.append(index)
        logits.append(guided)
    index, value, guided = run.last_scale(f_hat, context, cache, filled)
    f_hat = f_hat + value.reshape(f_hat.shape)
    image = jnp.clip(run.tokenizer("decode", f_hat), -1.0, 1.0)
    return Generated((*indices, index), (*logits, guided), f_hat, image)


class _Run:
    """The modules with their parameters, and the steps of one generation that use them."""

    def __init__(self, hart: Hart, tokenizer: Tokenizer, params: dict[str, Any], settings: SampleConfig, noise: Noise):
        self._modules = hart, tokenizer
        self._params, self._settings, self._noise = params, settings, noise
        self._sides = hart.config.patch_nums

    def hart(self, method: str, *args, **kwargs):
        return self._modules[0].apply({"params": self._params["transformer"]}, *args, **kwargs, method=method)

    def tokenizer(self, method: str, *args):
        return self._modules[1].apply({"params": self._params["tokenizer"]}, *args, method=method)

    def _ratio(self, scale: int) -> float:
        """Progress 0..1; at the last scale it stays what it was."""
        last = len(self._sides) - 1
        return min(scale, last - 1) / last

    def token_noise(self, scale: int, batch: int) -> tuple[jax.Array, jax.Array | None]:
        """Gumbel noise of choice and of smoothing (None without) for all positions of a scale."""
        shape = (batch, self._sides[scale] ** 2, self._modules[0].config.vocab_size)
        smooth = self._noise.smooth(scale, shape) if self._settings.smooth else None
        return self._noise.token(scale, shape), smooth

    def scale_input(self, f_hat: jax.Array, scale: int, context: Context) -> tuple[jax.Array, jax.Array]:
        side = self._sides[scale]
        latent = area(f_hat, side).reshape(len(f_hat), side * side, -1)
        index_1l = jnp.arange(side * side)[None]
        return self.hart("scale_input", jnp.concatenate([latent, latent]), scale, index_1l, context)

    def choose(
        self, hidden: jax.Array, context: Context, scale: int, noise: tuple[jax.Array, jax.Array | None]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Indices (B, l), the code or its smooth version (B, l, C), and the guided logits (B, l, V)."""
        settings, ratio = self._settings, self._ratio(scale)
        cond, uncond = jnp.split(self.hart("logits", hidden, context), 2)
        t = settings.cfg * ratio
        guided = (1 + t) * cond - t * uncond
        top_k = settings.top_k if scale < settings.late_scale else settings.top_k_late
        kept = keep_top(guided / settings.temperature, top_k, settings.top_p)
        token_noise, smooth_noise = noise
        index = jnp.argmax(kept + token_noise, axis=-1).astype(jnp.int32)
        if smooth_noise is None:
            return index, self.tokenizer("lookup", index), guided
        tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
        weights = jax.nn.softmax((kept * (1 + ratio) + smooth_noise) / tau, axis=-1)
        return index, weights @ self._params["tokenizer"]["quantizer"]["codebook"], guided

    def last_scale(
        self, f_hat: jax.Array, context: Context, cache: KVCache, filled: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Indices, code plus residual (B, l, C) and guided logits of the last scale, in masked iterations."""
        settings, config = self._settings, self._modules[0].config
        scale, batch, count = len(self._sides) - 1, len(f_hat), self._sides[-1] ** 2
        order_Bl = jnp.broadcast_to(jnp.arange(count), (batch, count))
        if settings.masked_iterations > 1:
            order_Bl = self._noise.order((batch, count))
        x_all, angle_all = self.scale_input(f_hat, scale, context)
        token_noise, smooth_noise = self.token_noise(scale, batch)
        shape = (batch, count, config.latent_channels)
        if not settings.discrete_only:
            init_noise = self._noise.init(shape)
            step_noise = self._noise.step((config.diffusion.sampling_steps, *shape))
        index_all = jnp.zeros((batch, count), jnp.int32)
        value_all, guided_all = jnp.zeros(shape), jnp.zeros((batch, count, config.vocab_size))
        # The last of the order is filled first: what an iteration leaves for later is the order's beginning.
        end = count
        for size in iteration_sizes(count, settings.masked_iterations):
            at_Bl = jnp.sort(order_Bl[:, end - size : end], axis=1)
            end -= size

            def pick(array, at_Bl=at_Bl):
                repeated = jnp.tile(at_Bl, (len(array) // batch, 1))
                return jnp.take_along_axis(array, repeated[..., None], axis=1)

            hidden, cache = self.hart("blocks", pick(x_all), pick(angle_all), context, cache=cache, cache_start=filled)
            filled += size
            noise = pick(token_noise), None if smooth_noise is None else pick(smooth_noise)
            index, value, guided = self.choose(hidden, context, scale, noise)
            if not settings.discrete_only:
                steps = None if step_noise is None else jax.vmap(pick)(step_noise)
                value = value + self._residual(hidden, index, pick(init_noise), steps)
            rows = jnp.arange(batch)[:, None]
            index_all = index_all.at[rows, at_Bl].set(index)
            value_all = value_all.at[rows, at_Bl].set(value)
            guided_all = guided_all.at[rows, at_Bl].set(guided)
        return index_all, value_all, guided_all

    def _residual(
        self, hidden: jax.Array, index_Bl: jax.Array, init_BlC: jax.Array, steps_SBlC: jax.Array | None
    ) -> jax.Array:
        """The continuous residual (B, l, C) of positions whose code is chosen."""
        code = self.tokenizer("lookup", index_Bl)
        z = self.hart("residual_condition", hidden, jnp.concatenate([code, code]))
        channels = code.shape[-1]
        if steps_SBlC is not None:
            steps_SBlC = jnp.concatenate([steps_SBlC, steps_SBlC], axis=1)
            steps_SBlC = steps_SBlC.reshape(len(steps_SBlC), -1, channels)
        config = self._modules[0].config
        out = sample_residual(
            functools.partial(self.hart, "denoise"),
            z.reshape(-1, z.shape[-1]),
            init_BlC.reshape(-1, channels),
            steps_SBlC,
            self._settings.cfg * self._ratio(len(self._sides) - 1),
            config.diffusion.sampling_steps,
        )
        return out[: len(out) // 2].reshape(code.shape)


Sampler = Callable[[dict[str, Any], Condition, Any, jax.Array], tuple[jax.Array, tuple[jax.Array, ...]]]


def make_sampler(hart: Hart, tokenizer: Tokenizer, settings: SampleConfig) -> Sampler:
    """The compiled function (params, condition, seed, image indices (B,)) -> (images in [-1, 1], indices per scale).

    A picture depends on its condition, the seed and its index, never on the others of its batch.
    """
    settings.check_vocabulary(hart.config.vocab_size)
    hart = hart.clone(attention=settings.attention)

    @jax.jit
    def sample(params, condition, seed, indices_B):
        noise = KeyedNoise.of(seed, indices_B)
        out = generate(hart, tokenizer, params, condition, noise, settings)
        return out.image, out.indices

    return sample
