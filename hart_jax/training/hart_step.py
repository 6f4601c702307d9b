"""One training step of the transformer and its diffusion head (SPEC.md section 5)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hart_jax.config import HartLossConfig
from hart_jax.diffusion.schedule import TRAIN_STEPS
from hart_jax.io.images import from_uint8
from hart_jax.parallel.mesh import MeshLayout
from hart_jax.parallel.program import Program
from hart_jax.sampling.rules import keep_top
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import TokenCorruption, Tokens
from hart_jax.training.accumulate import accumulate_microbatches
from hart_jax.training.rounds import images_in_rounds
from hart_jax.training.state import Metrics, Optimizer, Params, TrainState, apply_gradients
from hart_jax.training.token_subsampling import draw_kept_tokens
from hart_jax.transformer.model import Hart


def tokens_of(tokenizer: Tokenizer, params: Params, image_BHWC: jax.Array) -> Tokens:
    """The tokens of images (uint8), of each device a few at a time."""

    def encode(image_BHWC: jax.Array) -> Tokens:
        return tokenizer.apply({"params": params}, from_uint8(image_BHWC), method="tokens")

    return images_in_rounds(encode, image_BHWC)


def tokens_at(tokenizer: Tokenizer, base: Tokenizer, params: Params, tokens: Tokens) -> Tokens:
    """The tokens of `tokenizer`'s list of the same images, from those of `base`'s list of scales.

    Those of its own list are as they are. Others are made of the latent that the given ones add up to: the image's up
    to rounding, which is that of float16 where `f_rest` was kept so.
    """
    if tokenizer.config == base.config:
        return tokens
    variables = {"params": params}
    return tokenizer.apply(variables, base.apply(variables, tokens, method="latent"), method="latent_tokens")


def drop_condition(hart: Hart, condition: Any, dropped_B: jax.Array) -> Any:
    """The condition with some samples made unconditional, exactly as sampling's guidance has them."""
    if hart.config.num_classes:
        return jnp.where(dropped_B, hart.config.num_classes, condition)
    text_BTD, mask_BT = condition
    alone_T = jnp.zeros(mask_BT.shape[1], mask_BT.dtype).at[0].set(1)
    return jnp.where(dropped_B[:, None, None], 0.0, text_BTD), jnp.where(dropped_B[:, None], alone_T, mask_BT)


def draw_token_corruption(
    tokenizer: Tokenizer, params: Params, tokens: Tokens, most: float, key_B: jax.Array
) -> Tokens:
    """The tokens where every sample builds on codes that are more or less wrong, up to `most` (`TokenCorruption`)."""
    level_key_B, noise_key_B = jnp.moveaxis(
        jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 1)))(key_B), 1, 0
    )
    level_B = jax.vmap(lambda key: jax.random.uniform(key, maxval=most))(level_key_B)
    wrong = TokenCorruption(level_B, noise_key_B)
    return tokenizer.apply({"params": params}, tokens, wrong, method="corrupt")


def token_losses(logits_BLV: jax.Array, targets: list[jax.Array]) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy over all tokens, and loss and accuracy of each scale."""
    metrics: Metrics = {}
    total, start = jnp.zeros(()), 0
    for scale, target_Bl in enumerate(targets):
        logits = logits_BLV[:, start : start + target_Bl.shape[1]]
        start += target_Bl.shape[1]
        loss_Bl = optax.softmax_cross_entropy_with_integer_labels(logits, target_Bl)
        metrics[f"loss_scale_{scale}"] = loss_Bl.mean()
        # Not by argmax, for which a CPU takes longer than for the loss.
        right_Bl = jnp.take_along_axis(logits, target_Bl[..., None], -1)[..., 0] == logits.max(-1)
        metrics[f"accuracy_scale_{scale}"] = jnp.mean(right_Bl)
        total += loss_Bl.sum()
    return total / (start * len(logits_BLV)), metrics


# (logits (B, L, V), indices (B, l) of each scale) -> (loss, metrics)
TokenLoss = Callable[[jax.Array, list[jax.Array]], tuple[jax.Array, Metrics]]


def make_loss(
    hart: Hart, loss: HartLossConfig, token_loss: TokenLoss = token_losses
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """The function (params, tokens, condition, codebook (V, C), kept (B, N), key (B,)) -> (loss, metrics).

    What `token_loss` says of a list of N scales that is not the model's `patch_nums` is named as `loss_scale_0_of_N`.
    """
    of_list = f"_of_{len(hart.config.patch_nums)}" if hart.config.levels else ""

    def compute(params: Params, tokens: Tokens, condition: Any, codebook_VC, kept_BN, key_B):
        variables = {"params": params}
        repeats = hart.config.diffusion.batch_mul
        draws = kept_BN.shape[1] * repeats

        def draw(key: jax.Array):
            index_key, time_key, noise_key = jax.random.split(key, 3)
            noise = jax.random.normal(noise_key, (draws, codebook_VC.shape[1]))
            return index_key, jax.random.randint(time_key, (draws,), 0, TRAIN_STEPS), noise

        index_key_B, time_BM, noise_BMC = jax.vmap(draw)(key_B)
        output = hart.apply(variables, condition, tokens.ar_input_BLC, kept_BN)
        last_target_BN = jnp.take_along_axis(tokens.indices[-1], kept_BN, axis=1)
        of_tokens, metrics = token_loss(output.logits, [*tokens.indices[:-1], last_target_BN])
        metrics = {name + of_list: value for name, value in metrics.items()}
        # The head sees codes that the model itself would sample, so that it learns to repair them.
        likely = keep_top(output.logits[:, -kept_BN.shape[1] :], loss.condition_top_k, loss.condition_top_p)
        sampled_BN = jax.lax.stop_gradient(jax.vmap(jax.random.categorical)(index_key_B, likely))
        code_BNC = codebook_VC[sampled_BN]
        z_BNW = hart.apply(variables, output.last_hidden, code_BNC, method="residual_condition")
        target_BNC = jnp.take_along_axis(tokens.f_rest_BPC, kept_BN[..., None], axis=1) - code_BNC
        # Draws of one token lie together, so that every device keeps its own samples' rows.
        target_NC = jnp.repeat(target_BNC.reshape(-1, target_BNC.shape[-1]), repeats, axis=0)
        z_NW = jnp.repeat(z_BNW.reshape(-1, z_BNW.shape[-1]), repeats, axis=0)
        residual = hart.objective.loss(
            functools.partial(hart.apply, variables, method="denoise"),
            target_NC,
            z_NW,
            time_BM.reshape(-1),
            noise_BMC.reshape(target_NC.shape),
        )
        parts = {"loss_token": of_tokens, "loss_diffusion": residual.loss.mean(), "diffusion_mse": residual.mse.mean()}
        total = loss.token * of_tokens + loss.diffusion * parts["loss_diffusion"]
        return total, {"loss": total, **parts, **metrics}

    return compute


def make_hart_step(
    hart: Hart,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    loss: HartLossConfig,
    ema_decay: float,
    shardings: Any = None,
    accumulate: int = 1,
    layout: MeshLayout | None = None,
    token_loss: TokenLoss = token_losses,
    base: Tokenizer | None = None,
) -> Program:
    """The program (state, tokenizer's params, source, condition, key, num_kept) -> (state, metrics).

    `source` are images (B, H, W, 3) uint8, or their `Tokens` where these were computed ahead, by `base` if not by
    `tokenizer`: see `tokens_at`. `num_kept`, the number of last-scale tokens in this step, is static: one
    compilation for each. The state is donated. `shardings` are the shardings of (state, metrics). Gradients are means
    over `accumulate` parts of the batch. `token_loss` is the loss of the indices.
    """
    compute = make_loss(hart, loss, token_loss)

    def step(state: TrainState, tokenizer_params: Params, source: jax.Array | Tokens, condition, key, num_kept: int):
        drop_key, keep_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        batch = len(jax.tree.leaves(condition)[0])
        dropped_B = jax.random.bernoulli(drop_key, loss.drop_text, (batch,))
        condition = drop_condition(hart, condition, dropped_B)
        kept_BN = draw_kept_tokens(keep_key, batch, hart.config.sizes[-1], num_kept)
        codebook_VC = tokenizer_params["quantizer"]["codebook"]
        gradient = jax.value_and_grad(compute, has_aux=True)

        def of_microbatch(rows: Any) -> tuple[tuple[Params, Metrics], None]:
            source, condition, kept_BN, key_B = rows
            if isinstance(source, Tokens):
                tokens = tokens_at(tokenizer, base or tokenizer, tokenizer_params, source)
            else:
                tokens = tokens_of(tokenizer, tokenizer_params, source)
            if loss.mistakes:
                tokens = draw_token_corruption(tokenizer, tokenizer_params, tokens, loss.mistakes, key_B)
            (_, metrics), grads = gradient(state.params, tokens, condition, codebook_VC, kept_BN, key_B)
            if shardings is not None:
                grads = jax.lax.with_sharding_constraint(grads, shardings[0].params)
            return (grads, metrics), None

        rows = source, condition, kept_BN, jax.random.split(loss_key, batch)
        (grads, metrics), _ = accumulate_microbatches(of_microbatch, rows, accumulate)
        state, update_metrics = apply_gradients(state, grads, metrics["loss"], optimizer, ema_decay)
        return state, {**metrics, **update_metrics}

    options: dict[str, Any] = {"static_argnames": "num_kept", "donate_argnums": 0, "out_shardings": shardings}
    return Program("transformer step", step, layout, hart.dtype, **options)
