"""The sampler in many small programs, layer by layer.

So a CPU samples from a large model: there a loop over stacked layers copies the weights of each before it uses them.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hart_jax.config import SampleConfig
from hart_jax.parallel.program import Program
from hart_jax.sampling.noise import KeyedNoise
from hart_jax.sampling.rules import HART_RULES, Rules
from hart_jax.sampling.sampler import Params, Sampler, Sampling
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.transformer.block import Block, KVCache
from hart_jax.transformer.mask import DenseMask
from hart_jax.transformer.model import Hart

# Told of every stage of a layered run, when it is over: its name, its settings and its seconds.
Watch = Callable[[str, dict[str, Any], float], None]

_STEPS = (
    "context",
    "last_position",
    "scale_input",
    "add",
    "decode",
    "order",
    "part",
    "fill",
    "scatter",
)


class LayerwiseSampling(Sampling):
    """As `Sampling`, to be called outside of a compiled function, on `split_layers` of the parameters.

    A cache is a list of one for each layer.
    """

    def __init__(
        self,
        hart: Hart,
        tokenizer: Tokenizer,
        settings: SampleConfig,
        watch: Watch | None = None,
        rules: Rules = HART_RULES,
    ):
        super().__init__(hart, tokenizer, settings, rules)
        self._watch = watch
        self._programs: dict[Any, Callable[..., Any]] = {}
        for name in _STEPS:
            setattr(self, name, functools.partial(self._compiled, getattr(super(), name)))

    def _compiled(self, step: Callable[..., Any], params: Params, *arrays: Any, **static: Any) -> Any:
        return self._program(step, **static)(params, *arrays)

    def _program(self, step: Callable[..., Any], donate: tuple[str, ...] = (), **static: Any) -> Callable[..., Any]:
        """The step with these settings, compiled."""
        bound, key = functools.partial(step, **static), (step.__name__, *sorted(static.items()))
        program = self._programs.setdefault(
            key, Program("sampler, layer by layer", bound, None, self._hart.dtype, donate_argnames=donate)
        )
        watch = self._watch
        if watch is None:
            return program

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = jax.block_until_ready(program(*args, **kwargs))
            watch(step.__name__, static, time.perf_counter() - started)
            return result

        return watched

    def _join(self, cond: Any, uncond: Any, length: int) -> Any:
        join = self._program(self.join, context_tokens=self._config.context_tokens, length=length)
        return [join(*each) for each in zip(cond, uncond, strict=True)]

    def _empty_cache(self, rows: int, positions: int) -> Any:
        one, dtype = dataclasses.replace(self._config, depth=1), self._hart.dtype or jnp.float32
        return [KVCache.empty(one, rows, positions, dtype) for _ in range(self._config.depth)]

    def _blocks(self, params: Params, x, cos_sin, pooled, cache: Any, *, start: int, keep=True, seen=None):
        # A layer's cache is written in place.
        block, caches = self._program(self.block, ("cache",), start=start, keep=keep, seen=seen), []
        for weights, part in zip(params["transformer"]["layers"], cache, strict=True):
            x, part = block(weights, x, cos_sin, pooled, cache=part)
            caches.append(part)
        return x, caches

    def block(self, weights, x, cos_sin, pooled, cache: KVCache, start: int, keep: bool, seen: DenseMask | None):
        """One block, whose cache is its own alone."""
        hart = self._hart
        block = Block(self._config, seen, start, hart.dtype, hart.attention)
        x, new = block.apply({"params": weights}, x, jnp.int32(0), cos_sin, pooled, cache)
        return x, cache.append(start, jax.tree.map(lambda own: own[None], new)) if keep else cache


def make_layered_sampler(
    hart: Hart,
    tokenizer: Tokenizer,
    settings: SampleConfig,
    watch: Watch | None = None,
    rules: Rules = HART_RULES,
) -> Sampler:
    """As `make_sampler`, layer by layer, on `split_layers` of the parameters; it waits for each stage to `watch`."""
    sampling = LayerwiseSampling(hart.clone(attention=settings.attention), tokenizer, settings, watch, rules)

    def sample(params, condition, seed, indices_B, numbers=None):
        out = sampling.run(params, condition, KeyedNoise.of(seed, indices_B), keep_logits=False, numbers=numbers)
        return out.image, out.indices

    return sample


def split_layers(params: Params) -> Params:
    """The parameters with the transformer's stacked layers as one tree for each, as views where they are NumPy's."""
    layers = params["transformer"]["layers"]
    depth = len(jax.tree.leaves(layers)[0])
    each = [jax.tree.map(lambda x, at=at: x[at], layers) for at in range(depth)]
    return {**params, "transformer": {**params["transformer"], "layers": each}}
