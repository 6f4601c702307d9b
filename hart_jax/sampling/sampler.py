"""From conditions to images: all scales, the residual, the decoder (SPEC.md section 3).

Classifier-free guidance doubles the batch: rows 0..B-1 are conditional, rows B..2B-1 unconditional. `make_sampler` is
one compiled program; `hart_jax.sampling.layerwise` computes the same layer by layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hart_jax.config import SampleConfig, TokenizerConfig
from hart_jax.nn.guidance import guide
from hart_jax.nn.rounds import in_rounds
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.sampling.noise import KeyedNoise, Noise
from hart_jax.sampling.rules import (
    HART_RULES,
    Rules,
    SampleNumbers,
    iteration_sizes,
    keep_largest,
    keep_nucleus,
    progress,
)
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.resize import area
from hart_jax.transformer.block import KVCache
from hart_jax.transformer.mask import DenseMask
from hart_jax.transformer.model import Context, Hart

# Images of so many pixels are decoded at a time: one of 1024 px.
DECODED_PIXELS = 2**20

Condition = Any  # (B,) labels, or text states (B, T, D) and mask (B, T)
Params = dict[str, Any]  # {"transformer": ..., "tokenizer": ...}


@flax.struct.dataclass
class Generated:
    """Per scale, `indices` (B, p*q) and guided `logits` (B, p*q, V) before top-k and temperature; then the last latent
    `f_hat` (B, h, w, C) and `image` (B, H, W, 3) in [-1, 1]."""

    indices: tuple[jax.Array, ...]
    logits: tuple[jax.Array, ...]
    f_hat: jax.Array
    image: jax.Array


def generate(
    hart: Hart,
    tokenizer: Tokenizer,
    params: Params,
    condition: Condition,
    noise: Noise,
    settings: SampleConfig,
    rules: Rules = HART_RULES,
) -> Generated:
    """Samples one image per condition.

    Args:
      params: {"transformer": ..., "tokenizer": ...}.
      condition: (B,) labels, or text states (B, T, D) and mask (B, T).
      noise: `KeyedNoise`, or given arrays.
    """
    return Sampling(hart, tokenizer, settings, rules).run(params, condition, noise)


class Sampling:
    """The steps of a generation, and `run`, which puts them together.

    A step takes parameters, arrays (`SampleNumbers` among them), and settings by name. `hart_jax.sampling.layerwise`
    compiles each by itself.
    """

    def __init__(self, hart: Hart, tokenizer: Tokenizer, settings: SampleConfig, rules: Rules = HART_RULES):
        settings.check_fits(hart.config)
        if settings.scales:
            raise ValueError(f"scales={settings.scales}: a sampler's list is that of `hart.config` (see `of_list`)")
        self._hart, self._tokenizer, self._settings, self._rules = hart, tokenizer, settings, rules
        self._config, self._last = hart.config, len(hart.config.shapes) - 1
        self._numbers = SampleNumbers.of(settings, rules, hart.config)
        self._iterations = rules.iterations_of(settings, hart.config.shapes)
        rules.check_negative(hart.config)

    def run(
        self,
        params: Params,
        condition: Condition,
        noise: Noise,
        keep_logits: bool = True,
        numbers: SampleNumbers | None = None,
    ) -> Generated:
        """All scales and the decoder; `numbers` instead of those of the settings."""
        shapes, last = self._config.shapes, self._last
        numbers = numbers or self._numbers
        context, cond, uncond = self.context(params, condition)
        length = self._config.context_tokens + self._config.num_tokens - 1
        if self._iterations[last] == 1:
            # Nothing comes after the last scale that would see it.
            length -= self._config.sizes[-1]
        hidden, cache = self._first(params, context, cond, uncond, length)
        f_hat = jnp.zeros((len(cond[0]), *shapes[-1], self._config.latent_channels))
        index, code, guided = self.fill(params, hidden, context, noise, numbers, None, scale=0)
        indices, logits = [index], [guided] if keep_logits else []
        for scale in range(1, len(shapes)):
            f_hat = self.add(params, f_hat, code, scale=scale - 1)
            (index, code, guided), cache = self._scale(params, f_hat, context, cache, noise, numbers, scale)
            indices.append(index)
            logits += [guided] if keep_logits else []
        # An image's latent and colours are small beside these.
        del cache, hidden, guided
        f_hat, image = self.decode(params, f_hat, code)
        return Generated(tuple(indices), tuple(logits), f_hat, image)

    def context(self, params: Params, condition: Condition) -> tuple[Context, Any, Any]:
        """The doubled context, then (inputs, rotations, pooled) of the conditional and of the unconditional context.

        The latter is the same at all its positions, zero text with position ids 0, and for all samples: one stands for
        all of them. A negative condition has positions of its own.
        """
        config, apply = self._config, functools.partial(self._apply, params)
        cond = apply("embed_condition", condition)
        nothing: Condition = jnp.full((1,), config.num_classes)
        if self._rules.negative is not None:
            nothing = self._rules.negative
        elif not config.num_classes:
            nothing = jnp.zeros((1, 1, config.context_dim), condition[0].dtype), jnp.ones((1, 1), jnp.int32)
        uncond = apply("embed_condition", nothing)
        batch = len(cond.tokens)

        def double(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.concatenate([a, jnp.broadcast_to(b, (batch, *a.shape[1:]))])

        both = jax.tree.map(double, cond, uncond)
        cond_input, uncond_input = ((*apply("context_input", each), each.pooled) for each in (cond, uncond))
        return both, cond_input, uncond_input

    def _first(self, params: Params, context: Context, cond: Any, uncond: Any, length: int) -> tuple[jax.Array, Any]:
        """The last context position's output (2B, 1, W), and a cache for `length` positions that holds the context."""
        hidden, caches = [], []
        for x, cos_sin, pooled in (cond, uncond):
            cache, count = self._empty_cache(*x.shape[:2]), x.shape[1]
            seen = self._hart.mask.of_last(count, (), count)
            out, cache = self._blocks(params, x, cos_sin, pooled, cache, start=0, seen=seen)
            hidden.append(out)
            caches.append(cache)
        return self.last_position(params, *hidden), self._join(caches[0], caches[1], length)

    def last_position(self, params: Params, cond_BTW: jax.Array, uncond_1TW: jax.Array) -> jax.Array:
        last = cond_BTW[:, -1:]
        return jnp.concatenate([last, jnp.broadcast_to(uncond_1TW[:, -1:], last.shape)])

    def _join(self, cond: Any, uncond: Any, length: int) -> Any:
        return self.join(cond, uncond, context_tokens=self._config.context_tokens, length=length)

    def join(self, cond: KVCache, uncond: KVCache, context_tokens: int, length: int) -> KVCache:
        """The cache of both halves."""

        def both(a: jax.Array, b: jax.Array) -> jax.Array:
            layers, batch, _, width = a.shape
            rows = jnp.concatenate([a, jnp.broadcast_to(b, (layers, batch, context_tokens, width))], axis=1)
            return jnp.pad(rows, ((0, 0), (0, 0), (0, length - context_tokens), (0, 0)))

        return KVCache(both(cond.k, uncond.k), both(cond.v, uncond.v)).placed()

    def _empty_cache(self, rows: int, positions: int) -> Any:
        return KVCache.empty(self._config, rows, positions, self._hart.dtype or jnp.float32)

    def _blocks(
        self,
        params: Params,
        x: jax.Array,
        cos_sin: jax.Array,
        pooled: jax.Array | None,
        cache: Any,
        *,
        start: int,
        keep: bool = True,
        seen: DenseMask | None = None,
    ) -> tuple[jax.Array, Any]:
        """All blocks; `start` is where the cache ends, `keep` whether it takes the new positions, `seen` what of both
        they see (None: all)."""
        settings: dict[str, Any] = {"cache_start": start, "keep": keep, "segments": seen}
        return self._apply(params, "blocks", x, cos_sin, pooled, cache=cache, **settings)

    def scale_input(self, params: Params, f_hat: jax.Array, context: Context, scale: int):
        count = self._config.sizes[scale]
        latent = area(f_hat, self._config.shapes[scale]).reshape(len(f_hat), count, -1)
        index_1l = jnp.arange(count)[None]
        return self._apply(params, "scale_input", jnp.concatenate([latent, latent]), scale, index_1l, context)

    def choose(
        self,
        params: Params,
        hidden: jax.Array,
        context: Context,
        noise: Noise,
        numbers: SampleNumbers,
        at_Bl: jax.Array | None,
        scale: int,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Indices (B, l), what they add to the latent, the code (B, l, C) or its smooth version, the code itself, and
        the guided logits (B, l, V), of the positions `at` of a scale; None: all."""
        cond, uncond = jnp.split(self._apply(params, "logits", hidden, context), 2)
        guided = guide(cond, uncond, numbers.guidance_S2[scale])
        shape = len(cond), self._config.sizes[scale], self._config.vocab_size
        kept = guided / numbers.temperature
        if numbers.top_k_S is not None:
            kept = keep_largest(kept, numbers.top_k_S[scale])
        if numbers.tail is not None:
            kept = keep_nucleus(kept, numbers.tail)
        index = jnp.argmax(kept + _pick(noise.token(scale, shape), at_Bl), axis=-1).astype(jnp.int32)
        code = self._tokenize(params, "lookup", index)
        if not self._settings.smooth:
            return index, code, code, guided
        ratio = progress(self._config.level_of(scale), self._config.num_levels)
        tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
        noisy = kept * (1 + ratio) + _pick(noise.smooth(scale, shape), at_Bl)
        smooth = jax.nn.softmax(noisy / tau, axis=-1) @ params["tokenizer"]["quantizer"]["codebook"]
        return index, smooth, code, guided

    def add(self, params: Params, f_hat: jax.Array, code: jax.Array, scale: int) -> jax.Array:
        return f_hat + self._tokenize(params, "contribution", code, scale)

    def decode(self, params: Params, f_hat: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        f_hat = f_hat + value.reshape(f_hat.shape)
        return f_hat, jnp.clip(self._decoded(params, f_hat), -1.0, 1.0)

    def _decoded(self, params: Params, f_hat: jax.Array) -> jax.Array:
        """Decoded latents, of each device a few at a time, as the widest activations are a decoder's."""
        at_once = images_decoded_at_once(self._tokenizer.config, self._settings)
        return in_rounds(functools.partial(self._tokenize, params, "decode"), f_hat, at_once)

    def _scale(
        self,
        params: Params,
        f_hat: jax.Array,
        context: Context,
        cache: Any,
        noise: Noise,
        numbers: SampleNumbers,
        scale: int,
    ):
        """Indices, what they add to the latent (B, l, C) and guided logits of a scale, in its iterations; the cache."""
        before, count = self._config.sizes[1:scale], self._config.sizes[scale]
        start, iterations = self._config.context_tokens + sum(before), self._iterations[scale]
        x_all, cos_sin_all = self.scale_input(params, f_hat, context, scale=scale)
        if iterations == 1:
            # Nothing comes after the last scale that would see it.
            keep, seen = scale < self._last, self._seen((*before, count), count)
            hidden, cache = self._blocks(
                params, x_all, cos_sin_all, context.pooled, cache, start=start, keep=keep, seen=seen
            )
            return self.fill(params, hidden, context, noise, numbers, None, scale=scale), cache
        order_Bl = self.order(params, f_hat, noise, scale=scale)
        parts, places = [], []
        # The last of the order is filled first: what an iteration leaves for later is the order's beginning.
        end = count
        for size in iteration_sizes(count, iterations):
            at_Bl, x, cos_sin = self.part(params, order_Bl, x_all, cos_sin_all, begin=end - size, end=end)
            filled, end = start + count - end, end - size
            seen = self._seen((*before, count - end), size)
            hidden, cache = self._blocks(params, x, cos_sin, context.pooled, cache, start=filled, seen=seen)
            parts.append(self.fill(params, hidden, context, noise, numbers, at_Bl, scale=scale))
            places.append(at_Bl)
        return self.scatter(params, places, parts), cache

    def _seen(self, scale_sizes: tuple[int, ...], count: int) -> DenseMask | None:
        return self._hart.mask.of_last(self._config.context_tokens, scale_sizes, count)

    def order(self, params: Params, f_hat: jax.Array, noise: Noise, scale: int) -> jax.Array:
        return noise.order((len(f_hat), self._config.sizes[scale]), None if scale == self._last else scale)

    def part(self, params: Params, order_Bl, x_all, cos_sin_all, begin: int, end: int):
        """The positions of an iteration, (B, l), and their inputs and rotations."""
        at_Bl = jnp.sort(order_Bl[:, begin:end], axis=1)
        return at_Bl, _pick(x_all, at_Bl), _pick(cos_sin_all, at_Bl)

    def fill(
        self,
        params: Params,
        hidden: jax.Array,
        context: Context,
        noise: Noise,
        numbers: SampleNumbers,
        at_Bl: jax.Array | None,
        scale: int,
    ):
        """Indices, what they add to the latent, at the last scale with the residual, and guided logits of the positions
        `at` of a scale; None: all."""
        index, value, code, guided = self.choose(params, hidden, context, noise, numbers, at_Bl, scale)
        if self._settings.discrete_only or scale < self._last:
            return index, value, guided
        shape = (len(index), self._config.sizes[-1], self._config.latent_channels)
        steps, channels = self._config.diffusion.sampling_steps, shape[-1]
        init_BlC = _pick(noise.init(shape), at_Bl)
        steps_SBlC = noise.step((steps, *shape))
        if steps_SBlC is not None:
            steps_SBlC = jax.vmap(lambda array: _pick(array, at_Bl))(steps_SBlC)
            steps_SBlC = jnp.concatenate([steps_SBlC, steps_SBlC], axis=1).reshape(steps, -1, channels)
        z = self._apply(params, "residual_condition", hidden, jnp.concatenate([code, code]))
        embedded_NW = self._apply(params, "embed_residual_condition", z.reshape(-1, z.shape[-1]))
        out = self._hart.objective.sample(
            functools.partial(self._apply, params, "denoise_embedded"),
            embedded_NW,
            init_BlC.reshape(-1, channels),
            steps_SBlC,
            numbers.guidance_S2[scale],
            steps,
        )
        return index, value + out[: len(out) // 2].reshape(code.shape), guided

    def scatter(self, params: Params, places: list[jax.Array], parts: list[tuple[jax.Array, ...]]):
        """What the iterations found, in the order of the positions."""
        at_Bl = jnp.argsort(jnp.concatenate(places, axis=1), axis=1)
        index, value, guided = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        return jnp.take_along_axis(index, at_Bl, axis=1), _pick(value, at_Bl), _pick(guided, at_Bl)

    def _apply(self, params: Params, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._hart.apply({"params": params["transformer"]}, *args, **kwargs, method=method)

    def _tokenize(self, params: Params, method: str, *args: Any) -> jax.Array:
        return self._tokenizer.apply({"params": params["tokenizer"]}, *args, method=method)


def images_decoded_at_once(config: TokenizerConfig, settings: SampleConfig) -> int:
    """By one device, where there are so many."""
    return settings.decode_at_once or max(1, DECODED_PIXELS // math.prod(config.image_shape))


def _pick(array: jax.Array, at_Bl: jax.Array | None) -> jax.Array:
    """Positions `at` of (B, L, ...) or of both halves, (2B, L, ...)."""
    if at_Bl is None:
        return array
    at_Bl = jnp.tile(at_Bl, (len(array) // len(at_Bl), 1))
    return jnp.take_along_axis(array, at_Bl.reshape(*at_Bl.shape, *[1] * (array.ndim - 2)), axis=1)


# (params, condition, seed, image indices (B,), numbers=None) -> (images, indices per scale)
Sampler = Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]


def make_sampler(
    hart: Hart,
    tokenizer: Tokenizer,
    settings: SampleConfig,
    layout: MeshLayout | None = None,
    rules: Rules = HART_RULES,
) -> Program:
    """The program (params, condition, seed, image indices (B,)) -> (images in [-1, 1], indices per scale).

    The seed is one for all, or (B,) of their own. A fifth argument, `SampleNumbers`, stands for those of the settings.
    With a layout, everything lies on its mesh.

    An image depends on its condition, the seed and its index, never on the others of its batch.
    """
    return Program("sampler", _sampling(hart, tokenizer, settings, rules), layout, hart.dtype)


def make_grid_sampler(
    hart: Hart, tokenizer: Tokenizer, settings: SampleConfig, layout: MeshLayout, rules: Rules = HART_RULES
) -> Program:
    """As `make_sampler`, of one more argument, a count: only the first so many images, whole on every device."""
    sample = _sampling(hart, tokenizer, settings, rules)

    def some(params: Params, condition: Condition, seed: Any, indices_B: jax.Array, count: int) -> jax.Array:
        return sample(params, condition, seed, indices_B)[0][:count]

    return Program("sample grid", some, layout, hart.dtype, static_argnums=4, out_shardings=layout.replicated)


def _sampling(hart: Hart, tokenizer: Tokenizer, settings: SampleConfig, rules: Rules) -> Sampler:
    sampling = Sampling(hart.clone(attention=settings.attention), tokenizer, settings, rules)

    def sample(params, condition, seed, indices_B, numbers=None):
        out = sampling.run(params, condition, KeyedNoise.of(seed, indices_B), numbers=numbers)
        return out.image, out.indices

    return sample
