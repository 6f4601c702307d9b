"""The random numbers of a generation, drawn from keys or given as arrays."""

from collections.abc import Callable
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp


class Noise(Protocol):
    """Everything random in a generation."""

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        """Gumbel noise that chooses the indices."""
        ...

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        """Gumbel noise of smooth sampling."""
        ...

    def order(self, shape_Bl: tuple[int, ...], scale: int | None = None) -> jax.Array:
        """The order of a scale's positions, a permutation per sample; None: of the last scale's."""
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
        """The noise of images number `indices` under `seed`, one for all or (B,) of their own."""
        seeds_B = jnp.broadcast_to(jnp.asarray(seed), indices_B.shape)
        return cls(jax.vmap(lambda seed, index: jax.random.fold_in(jax.random.key(seed), index))(seeds_B, indices_B))

    def _draw(self, purpose: int, sampler: Callable[[jax.Array], jax.Array]) -> jax.Array:
        return jax.vmap(lambda key: sampler(jax.random.fold_in(key, purpose)))(self.keys_B)

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self._draw(2 * scale, lambda key: jax.random.gumbel(key, shape_BlV[1:]))

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self._draw(2 * scale + 1, lambda key: jax.random.gumbel(key, shape_BlV[1:]))

    def order(self, shape_Bl: tuple[int, ...], scale: int | None = None) -> jax.Array:
        return self._draw(1000 if scale is None else 2000 + scale, lambda key: jax.random.permutation(key, shape_Bl[1]))

    def init(self, shape_BlC: tuple[int, ...]) -> jax.Array:
        return self._draw(1001, lambda key: jax.random.normal(key, shape_BlC[1:]))

    def step(self, shape_SBlC: tuple[int, ...]) -> jax.Array:
        steps, _, *shape = shape_SBlC
        return jnp.swapaxes(self._draw(1002, lambda key: jax.random.normal(key, (steps, *shape))), 0, 1)


@flax.struct.dataclass
class GivenNoise:
    """Noise from arrays: `tokens` one (B, p*q, V) per scale, `start` (B, p*q, C), `steps` (S, B, p*q, C) or None."""

    tokens: tuple[jax.Array, ...]
    start: jax.Array | None = None
    steps: jax.Array | None = None

    def token(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        return self.tokens[scale].astype(jnp.float32)

    def smooth(self, scale: int, shape_BlV: tuple[int, ...]) -> jax.Array:
        raise ValueError("given noise has none for smooth sampling")

    def order(self, shape_Bl: tuple[int, ...], scale: int | None = None) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(shape_Bl[1]), shape_Bl)

    def init(self, shape_BlC: tuple[int, ...]) -> jax.Array:
        if self.start is None:
            raise ValueError("given noise lacks `start`, which the residual's diffusion begins with")
        return self.start

    def step(self, shape_SBlC: tuple[int, ...]) -> jax.Array | None:
        return self.steps
