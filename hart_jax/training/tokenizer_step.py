"""One training step of the tokenizer: reconstruction, VQ, perceptual and adversarial losses."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hart_jax.config import Shape, TokenizerLossConfig
from hart_jax.io.images import from_uint8
from hart_jax.nn.flop_counter import StepFlops, count_flops, flops_of
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.tokenizer.discriminator import Discriminator
from hart_jax.tokenizer.losses import hinge_discriminator, hinge_generator, straight_through, vq_loss
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.perceptual import lpips
from hart_jax.training.accumulate import accumulate_microbatches
from hart_jax.training.rounds import images_in_rounds
from hart_jax.training.state import (
    Optimizer,
    Params,
    TrainState,
    all_finite,
    apply_gradients,
    new_state,
    select,
)


class TokenizerState(flax.struct.PyTreeNode):
    """The state of what is trained of the tokenizer, the rest of it, the discriminator (a `TrainState`, or None), and
    how often each code was hit lately (V,)."""

    model: TrainState
    frozen: Params
    disc: Any
    disc_stats: Any
    code_usage_V: jax.Array

    @property
    def step(self) -> jax.Array:
        return self.model.step

    @property
    def ema(self) -> Params:
        """The averaged parameters of the whole tokenizer."""
        return {**self.frozen, **self.model.ema}


def init_tokenizer_state(
    key: jax.Array,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    images_BHWC: jax.Array,
    freeze: Sequence[str] = (),
    adversarial: bool = True,
    count: int | None = None,
) -> TokenizerState:
    """A fresh state; the codebook starts as latents of `images_BHWC` (uint8), so that no code is out of reach.

    Only the first `count` images count; None: all.
    """
    model_key, _, code_key = jax.random.split(key, 3)
    params = nn.unbox(tokenizer.init(model_key, from_uint8(images_BHWC[:1]))["params"])

    def latents(image_BHWC: jax.Array) -> list[jax.Array]:
        quantized = tokenizer.apply(
            {"params": params}, from_uint8(image_BHWC), method=lambda m, x: m.quantize(m.encode(x))
        )
        return [z_NC.reshape(len(image_BHWC), -1, z_NC.shape[-1]) for z_NC in quantized.inputs]

    of_scales = [z_BNC[:count] for z_BNC in images_in_rounds(latents, images_BHWC)]
    latents_NC = jnp.concatenate([z_BNC.reshape(-1, z_BNC.shape[-1]) for z_BNC in of_scales])
    vocab_size = params["quantizer"]["codebook"].shape[0]
    chosen_V = jax.random.choice(code_key, len(latents_NC), (vocab_size,))
    params["quantizer"]["codebook"] = latents_NC[chosen_V]
    return tokenizer_state(key, params, optimizer, (images_BHWC.shape[1], images_BHWC.shape[2]), freeze, adversarial)


def tokenizer_state(
    key: jax.Array,
    params: Params,
    optimizer: Optimizer,
    image_shape: Shape,
    freeze: Sequence[str] = (),
    adversarial: bool = True,
) -> TokenizerState:
    """The state that starts from these parameters, with a new discriminator if training is `adversarial`; the modules
    `freeze` are not trained."""
    _, disc_key, _ = jax.random.split(key, 3)
    disc = None
    if adversarial:
        disc = nn.unbox(Discriminator().init(disc_key, jnp.zeros((1, *image_shape, 3))))
    return TokenizerState(
        model=new_state({name: part for name, part in params.items() if name not in freeze}, optimizer),
        frozen={name: params[name] for name in freeze},
        disc=new_state(disc["params"], optimizer) if disc else None,
        disc_stats=disc["batch_stats"] if disc else None,
        code_usage_V=jnp.ones(len(params["quantizer"]["codebook"])),
    )


def restart_unused_codes(
    key: jax.Array, state: TokenizerState, latents_NC: jax.Array, hits_V: jax.Array, below: float
) -> TokenizerState:
    """Codes hit in less than `below` of the recent batches become latents of this batch (Jukebox, section 3.2)."""
    usage_V = 0.99 * state.code_usage_V + 0.01 * hits_V
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
    optimizer: Optimizer,
    loss: TokenizerLossConfig,
    ema_decay: float,
    shardings: Any = None,
    accumulate: int = 1,
    layout: MeshLayout | None = None,
) -> Program:
    """The program (state, images (B, H, W, 3) uint8, key, lpips_params, adversarial) -> (state, metrics).

    `lpips_params` is None for no perceptual loss; `adversarial` is static: whether the discriminator takes part. Every
    image is decoded from its discrete or, with probability `continuous_fraction`, its full latent. Gradients are means
    over `accumulate` parts of the batch; the discriminator's BatchNorm sees one part at a time.
    """
    discriminator = Discriminator(dtype=tokenizer.dtype)

    def reconstruct(params: Params, image: jax.Array, continuous_B: jax.Array):
        variables = {"params": params}
        f = tokenizer.apply(variables, image, method="encode")
        quantized = tokenizer.apply(variables, f, method="quantize")
        discrete = straight_through(f, quantized.f_hat_BhwC)
        latent = jnp.where(continuous_B[:, None, None, None], f, discrete)
        output = tokenizer.apply(variables, latent, method="decode")
        return output, quantized, vq_loss(quantized, f, tokenizer.config.beta)

    def discriminate(params: Params, stats: Any, image: jax.Array):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = discriminator.apply(variables, image, train=True, mutable=["batch_stats"])
        return logits.astype(jnp.float32), updated["batch_stats"]

    def generator_loss(
        params: Params, state: TokenizerState, image: jax.Array, continuous_B: jax.Array, lpips_params, adversarial
    ):
        output, quantized, vq = reconstruct({**state.frozen, **params}, image, continuous_B)
        error_B = jnp.mean((output - image) ** 2, axis=(1, 2, 3))
        parts = {"mse": error_B.mean(), "vq": vq, "l1": jnp.mean(jnp.abs(output - image))}
        total = loss.mse * parts["mse"] + loss.vq * vq + loss.l1 * parts["l1"]
        if lpips_params is not None:
            parts["perceptual"] = lpips(lpips_params, output, image, stages=loss.perceptual_layers).mean()
            total += loss.perceptual * parts["perceptual"]
        if adversarial:
            parts["generator"] = hinge_generator(discriminate(state.disc.params, state.disc_stats, output)[0])
            total += loss.adversarial * parts["generator"]
        # Not yet divided by their shares of the batch.
        parts["mse_continuous"], parts["mse_discrete"] = (
            jnp.mean(error_B * on) for on in (continuous_B, ~continuous_B)
        )
        return total, ({"loss": total, **parts}, output, quantized)

    def discriminator_loss(params: Params, state: TokenizerState, real: jax.Array, fake: jax.Array):
        real_logits, stats = discriminate(params, state.disc_stats, real)
        fake_logits, stats = discriminate(params, stats, fake)
        return hinge_discriminator(real_logits, fake_logits), stats

    def step(state: TokenizerState, image_BHWC: jax.Array, key: jax.Array, lpips_params, adversarial: bool):
        decode_key, restart_key = jax.random.split(jax.random.fold_in(key, state.step))
        batch = len(image_BHWC)
        continuous_B = jax.random.bernoulli(decode_key, loss.continuous_fraction, (batch,))

        def of_microbatch(rows: tuple[jax.Array, jax.Array]) -> tuple[dict[str, Any], Any]:
            image, continuous_B = from_uint8(rows[0]), rows[1]
            gradient = jax.value_and_grad(generator_loss, has_aux=True)
            (_, (metrics, output, quantized)), grads = gradient(
                state.model.params, state, image, continuous_B, lpips_params, adversarial
            )
            if shardings is not None:
                grads = jax.lax.with_sharding_constraint(grads, shardings[0].model.params)
            means = {"model": grads, "metrics": metrics, "hits_V": quantized.hits_V}
            if adversarial:
                gradient = jax.value_and_grad(discriminator_loss, has_aux=True)
                fake = jax.lax.stop_gradient(output)
                (metrics["discriminator"], means["stats"]), means["disc"] = gradient(
                    state.disc.params, state, image, fake
                )
            latents = None
            if loss.restart_below > 0:
                of_samples = [z.reshape(len(image), -1, z.shape[-1]) for z in quantized.inputs]
                latents = jax.lax.stop_gradient(jnp.concatenate(of_samples, axis=1))
            return means, latents

        means, latents_BLC = accumulate_microbatches(of_microbatch, (image_BHWC, continuous_B), accumulate)
        metrics, hits_V = means["metrics"], jnp.where(means["hits_V"] > 0, 1.0, 0.0)
        metrics["codes_used"] = hits_V.mean()
        for name, chosen_B in (("continuous", continuous_B), ("discrete", ~continuous_B)):
            metrics[f"mse_{name}"] *= batch / jnp.maximum(1, chosen_B.sum())
        before = state
        model, updated = apply_gradients(state.model, means["model"], metrics["loss"], optimizer, ema_decay)
        metrics |= updated
        state = state.replace(model=model)
        if loss.restart_below > 0:
            latents_NC = latents_BLC.reshape(-1, latents_BLC.shape[-1])
            state = restart_unused_codes(restart_key, state, latents_NC, hits_V, loss.restart_below)
        if adversarial:
            disc, disc_metrics = apply_gradients(
                state.disc, means["disc"], metrics["discriminator"], optimizer, ema_decay
            )
            state = state.replace(disc=disc, disc_stats=means["stats"])
            metrics["skipped_steps"] = jnp.maximum(metrics["skipped_steps"], disc_metrics["skipped_steps"])
        # What else may not be finite any more shows in the norm too.
        others = [state.disc.params, state.disc_stats] if adversarial else []
        if loss.restart_below > 0:
            others.append(state.model.params["quantizer"])
        if others:
            metrics["param_norm"] = jnp.where(all_finite(others), metrics["param_norm"], jnp.nan)
        # If one of them is skipped, all are: codes, statistics and the other network.
        after = select(metrics["skipped_steps"] == 0, state, before)
        if after.disc:
            after = after.replace(disc=after.disc.replace(step=state.disc.step))
        return after.replace(model=after.model.replace(step=state.model.step)), metrics

    options: dict[str, Any] = {"static_argnames": "adversarial", "donate_argnums": 0, "out_shardings": shardings}
    return Program("tokenizer step", step, layout, tokenizer.dtype, **options)


def tokenizer_flops(traced: Any, tokenizer: Tokenizer, state: TokenizerState, image_BHWC: Any) -> StepFlops:
    """Of a step `traced` for this state and batch, or for their shapes.

    The model is the tokenizer's modules that are not frozen and, with a discriminator, its look at both kinds of
    images; LPIPS, and the discriminator in the generator's loss, count as frozen networks.
    """
    trained = set(state.model.params)
    params = {**state.frozen, **state.model.params}
    pixels = jax.ShapeDtypeStruct(image_BHWC.shape, jnp.float32)

    def forward(method: str, modules: set[str], x: Any) -> float:
        if not modules & trained:
            return 0.0
        return count_flops(lambda params, x: tokenizer.apply({"params": params}, x, method=method), params, x)

    latent = jax.eval_shape(lambda params, x: tokenizer.apply({"params": params}, x, method="encode"), params, pixels)
    total = forward("encode", {"encoder", "quant_conv"}, pixels)
    total += forward("quantize", {"quantizer"}, latent)
    total += forward("decode", {"post_quant_conv", "decoder"}, latent)
    adversarial = "discriminator" in traced.out_info[1]
    if adversarial:
        discriminator = Discriminator(dtype=tokenizer.dtype)
        variables = {"params": state.disc.params, "batch_stats": state.disc_stats}
        total += 2 * count_flops(
            lambda variables, x: discriminator.apply(variables, x, train=True, mutable=["batch_stats"]),
            variables,
            pixels,
        )
    return StepFlops(3 * total, flops_of(traced.jaxpr.jaxpr))
