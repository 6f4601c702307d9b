"""Losses of tokenizer training (SPEC.md section 1; VQGAN)."""

import jax
import jax.numpy as jnp

from hart_jax.tokenizer.quantizer import Quantized


def vq_loss(quantized: Quantized, f_BhwC: jax.Array, beta: float) -> jax.Array:
    """mean over scales of beta * mse(f_hat_s stopped, f) + mse(f_hat_s, f stopped): a scalar."""
    stop = jax.lax.stop_gradient
    per_scale = [
        beta * jnp.mean((stop(f_hat) - f_BhwC) ** 2) + jnp.mean((f_hat - stop(f_BhwC)) ** 2)
        for f_hat in quantized.partial
    ]
    return jnp.mean(jnp.stack(per_scale))


def straight_through(f_BhwC: jax.Array, f_hat_BhwC: jax.Array) -> jax.Array:
    """f_hat forward, the gradient of f backward."""
    return f_BhwC + jax.lax.stop_gradient(f_hat_BhwC - f_BhwC)


def hinge_discriminator(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's hinge loss on patch logits."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def hinge_generator(fake: jax.Array) -> jax.Array:
    """What the decoder minimises against the discriminator."""
    return -jnp.mean(fake)
