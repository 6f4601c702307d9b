"""One training step of the transformer and its diffusion head (SPEC.md section 5)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hart_jax.config import HartLossConfig
from hart_jax.diffusion.schedule import TRAIN_STEPS, diffusion_loss
from hart_jax.generate import keep_top
from hart_jax.images import from_uint8
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens
from hart_jax.training.state import Params, TrainState, apply_gradients
from hart_jax.transformer.model import Hart
from hart_jax.transformer.subsample import draw_kept

Metrics = dict[str, jax.Array]


def drop_condition(hart: Hart, condition: Any, dropped_B: jax.Array) -> Any:
    """The condition with some samples made unconditional, exactly as sampling's guidance has them."""
    if hart.config.num_classes:
        return jnp.where(dropped_B, hart.config.num_classes, condition)
    text_BTD, mask_BT = condition
    alone_T = jnp.zeros(mask_BT.shape[1], mask_BT.dtype).at[0].set(1)
    return jnp.where(dropped_B[:, None, None], 0.0, text_BTD), jnp.where(dropped_B[:, None], alone_T, mask_BT)


def token_losses(logits_BLV: jax.Array, targets: list[jax.Array]) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy over all tokens, and loss and accuracy of each scale."""
    metrics: Metrics = {}
    total, start = jnp.zeros(()), 0
    for scale, target_Bl in enumerate(targets):
        logits = logits_BLV[:, start : start + target_Bl.shape[1]]
        start += target_Bl.shape[1]
        loss_Bl = optax.softmax_cross_entropy_with_integer_labels(logits, target_Bl)
        metrics[f"loss_scale_{scale}"] = loss_Bl.mean()
        metrics[f"accuracy_scale_{scale}"] = jnp.mean(jnp.argmax(logits, -1) == target_Bl)
        total += loss_Bl.sum()
    return total / (start * len(logits_BLV)), metrics


def make_loss(hart: Hart, loss: HartLossConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The function (params, tokens, condition, codebook (V, C), kept (B, N), key) -> (loss, metrics)."""

    def compute(params: Params, tokens: Tokens, condition: Any, codebook_VC, kept_BN, key):
        variables = {"params": params}
        index_key, time_key, noise_key = jax.random.split(key, 3)
        output = hart.apply(variables, condition, tokens.ar_input_BLC, kept_BN)
        last_target_BN = jnp.take_along_axis(tokens.indices[-1], kept_BN, axis=1)
        token_loss, metrics = token_losses(output.logits, [*tokens.indices[:-1], last_target_BN])
        # The head sees codes that the model itself would draw, so that it learns to repair them.
        likely = keep_top(output.logits[:, -kept_BN.shape[1] :], loss.condition_top_k, loss.condition_top_p)
        sampled_BN = jax.lax.stop_gradient(jax.random.categorical(index_key, likely))
        code_BNC = codebook_VC[sampled_BN]
        z_BNW = hart.apply(variables, output.last_hidden, code_BNC, method="residual_condition")
        target_BNC = jnp.take_along_axis(tokens.f_rest_BPC, kept_BN[..., None], axis=1) - code_BNC
        repeats = (hart.config.diffusion.batch_mul, 1)
        target_NC = jnp.tile(target_BNC.reshape(-1, target_BNC.shape[-1]), repeats)
        z_NW = jnp.tile(z_BNW.reshape(-1, z_BNW.shape[-1]), repeats)
        residual = diffusion_loss(
            functools.partial(hart.apply, variables, method="denoise"),
            target_NC,
            z_NW,
            jax.random.randint(time_key, (len(target_NC),), 0, TRAIN_STEPS),
            jax.random.normal(noise_key, target_NC.shape),
        )
        parts = {"loss_token": token_loss, "loss_diffusion": residual.loss.mean(), "diffusion_mse": residual.mse.mean()}
        total = loss.token * token_loss + loss.diffusion * parts["loss_diffusion"]
        return total, {"loss": total, **parts, **metrics}

    return compute


def make_hart_step(
    hart: Hart, tokenizer: Tokenizer, optimizer: optax.GradientTransformation, loss: HartLossConfig, ema_decay: float
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function (state, tokenizer's params, images (B, H, W, 3) uint8, condition, key, kept) -> (state, metrics).

    `kept`, the number of last-scale tokens in this step, is static: one compilation for each.
    """
    compute = make_loss(hart, loss)

    def step(state: TrainState, tokenizer_params: Params, image_BHWC: jax.Array, condition, key, kept: int):
        drop_key, keep_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        image = from_uint8(image_BHWC)
        tokens = tokenizer.apply({"params": tokenizer_params}, image, method="tokens")
        dropped_B = jax.random.bernoulli(drop_key, loss.drop_text, (len(image),))
        condition = drop_condition(hart, condition, dropped_B)
        kept_BN = draw_kept(keep_key, len(image), hart.config.patch_nums[-1] ** 2, kept)
        codebook_VC = tokenizer_params["quantizer"]["codebook"]
        gradient = jax.value_and_grad(compute, has_aux=True)
        (_, metrics), grads = gradient(state.params, tokens, condition, codebook_VC, kept_BN, loss_key)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return apply_gradients(state, grads, optimizer, ema_decay), metrics

    return jax.jit(step, static_argnames="kept", donate_argnums=0)
