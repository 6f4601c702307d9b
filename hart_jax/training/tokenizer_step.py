"""One training step of the tokenizer: reconstruction, VQ, perceptual and adversarial losses."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from hart_jax.config import TokenizerLossConfig
from hart_jax.images import from_uint8
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.losses import hinge_discriminator, hinge_generator, straight_through, vq_loss
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import lpips
from hart_jax.tokenizer.quantizer import Quantized
from hart_jax.training.state import Params, TrainState, apply_gradients, new_state

Metrics = dict[str, jax.Array]


class TokenizerState(flax.struct.PyTreeNode):
    """The tokenizer's state, the discriminator's, and how often each code was hit lately (V,)."""

    model: TrainState
    disc: TrainState
    disc_stats: Any
    code_usage_V: jax.Array

    @property
    def step(self) -> jax.Array:
        return self.model.step


def init_tokenizer_state(
    key: jax.Array, tokenizer: Tokenizer, optimizer: optax.GradientTransformation, images_BHWC: jax.Array
) -> TokenizerState:
    """A fresh state; the codebook starts as latents of `images_BHWC` in [-1, 1], so that no code is out of reach."""
    model_key, disc_key, code_key = jax.random.split(key, 3)
    params = nn.unbox(tokenizer.init(model_key, images_BHWC)["params"])
    quantized = tokenizer.apply({"params": params}, images_BHWC, method=lambda m, x: m.quantize(m.encode(x)))
    latents_NC = jnp.concatenate(quantized.inputs)
    vocab_size = params["quantizer"]["codebook"].shape[0]
    chosen_V = jax.random.choice(code_key, len(latents_NC), (vocab_size,))
    params["quantizer"]["codebook"] = latents_NC[chosen_V]
    disc = nn.unbox(Discriminator().init(disc_key, images_BHWC[:1]))
    return TokenizerState(
        model=new_state(params, optimizer),
        disc=new_state(disc["params"], optimizer),
        disc_stats=disc["batch_stats"],
        code_usage_V=jnp.ones(vocab_size),
    )


def restart_unused_codes(key: jax.Array, state: TokenizerState, quantized: Quantized, below: float) -> TokenizerState:
    """Codes hit in less than `below` of the recent batches become latents of this batch (Jukebox, section 3.2)."""
    latents_NC = jax.lax.stop_gradient(jnp.concatenate(quantized.inputs))
    usage_V = 0.99 * state.code_usage_V + 0.01 * quantized.hits_V
    dead_V = usage_V < below
    fresh_VC = latents_NC[jax.random.randint(key, dead_V.shape, 0, len(latents_NC))]

    def replace_dead(params: Params) -> Params:
        codebook_VC = jnp.where(dead_V[:, None], fresh_VC, params["quantizer"]["codebook"])
        return {**params, "quantizer": {**params["quantizer"], "codebook": codebook_VC}}

    # The average restarts too: between an old code and a new one lies nothing useful.
    model = state.model.replace(params=replace_dead(state.model.params), ema=replace_dead(state.model.ema))
    return state.replace(model=model, code_usage_V=jnp.where(dead_V, 1.0, usage_V))


def make_tokenizer_step(
    tokenizer: Tokenizer,
    optimizer: optax.GradientTransformation,
    loss: TokenizerLossConfig,
    ema_decay: float,
) -> Callable[..., tuple[TokenizerState, Metrics]]:
    """The function (state, images (B, H, W, 3) uint8, key, lpips_params, adversarial) -> (state, metrics).

    `lpips_params` is None for no perceptual loss; `adversarial` is static: whether the discriminator takes part. Every
    image is decoded from its discrete or, with probability `continuous_fraction`, its full latent.
    """
    discriminator = Discriminator(dtype=tokenizer.dtype)

    def reconstruct(params: Params, image: jax.Array, key: jax.Array):
        variables = {"params": params}
        f = tokenizer.apply(variables, image, method="encode")
        quantized = tokenizer.apply(variables, f, method="quantize")
        continuous_B = jax.random.bernoulli(key, loss.continuous_fraction, (len(image),))
        discrete = straight_through(f, quantized.f_hat_BhwC)
        latent = jnp.where(continuous_B[:, None, None, None], f, discrete)
        output = tokenizer.apply(variables, latent, method="decode")
        return output, quantized, vq_loss(quantized, f, tokenizer.config.beta), continuous_B

    def judge(params: Params, stats: Any, image: jax.Array):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = discriminator.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits.astype(jnp.float32), updated["batch_stats"]

    def generator_loss(
        params: Params, state: TokenizerState, image: jax.Array, key: jax.Array, lpips_params, adversarial
    ):
        output, quantized, vq, continuous_B = reconstruct(params, image, key)
        error_B = jnp.mean((output - image) ** 2, axis=(1, 2, 3))
        parts = {"mse": error_B.mean(), "vq": vq, "l1": jnp.mean(jnp.abs(output - image))}
        total = loss.mse * parts["mse"] + loss.vq * vq + loss.l1 * parts["l1"]
        if lpips_params is not None:
            parts["perceptual"] = lpips(lpips_params, output, image, stages=loss.perceptual_layers).mean()
            total += loss.perceptual * parts["perceptual"]
        if adversarial:
            parts["generator"] = hinge_generator(judge(state.disc.params, state.disc_stats, output)[0])
            total += loss.adversarial * parts["generator"]
        for name, chosen_B in (("continuous", continuous_B), ("discrete", ~continuous_B)):
            parts[f"mse_{name}"] = jnp.sum(error_B * chosen_B) / jnp.maximum(1, chosen_B.sum())
        parts["codes_used"] = quantized.hits_V.mean()
        return total, (parts, output, quantized)

    def discriminator_loss(params: Params, state: TokenizerState, real: jax.Array, fake: jax.Array):
        real_logits, stats = judge(params, state.disc_stats, real)
        fake_logits, stats = judge(params, stats, fake)
        return hinge_discriminator(real_logits, fake_logits), stats

    def step(state: TokenizerState, image_BHWC: jax.Array, key: jax.Array, lpips_params, adversarial: bool):
        decode_key, restart_key = jax.random.split(jax.random.fold_in(key, state.step))
        image = from_uint8(image_BHWC)
        gradient = jax.value_and_grad(generator_loss, has_aux=True)
        (total, (parts, output, quantized)), grads = gradient(
            state.model.params, state, image, decode_key, lpips_params, adversarial
        )
        metrics = {"loss": total, "gradient_norm": optax.tree.norm(grads), **parts}
        state = state.replace(model=apply_gradients(state.model, grads, optimizer, ema_decay))
        if loss.restart_below > 0:
            state = restart_unused_codes(restart_key, state, quantized, loss.restart_below)
        if adversarial:
            gradient = jax.value_and_grad(discriminator_loss, has_aux=True)
            fake = jax.lax.stop_gradient(output)
            (disc_total, stats), grads = gradient(state.disc.params, state, image, fake)
            disc = apply_gradients(state.disc, grads, optimizer, ema_decay)
            state = state.replace(disc=disc, disc_stats=stats)
            metrics["discriminator"] = disc_total
        return state, metrics

    return jax.jit(step, static_argnames="adversarial", donate_argnums=0)
