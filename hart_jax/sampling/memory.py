"""What sampling one image takes at least, so that a size that cannot fit is refused before anything is compiled."""

import jax
import jax.numpy as jnp

from hart_jax.config import TokenizerConfig, TransformerConfig
from hart_jax.config.scales import area_of
from hart_jax.config.sizes import size_text
from hart_jax.errors import UserError
from hart_jax.io.host_memory import GIB, available_bytes

FLOAT32 = 4


def bytes_of_one(
    config: TransformerConfig, tokenizer: TokenizerConfig, dtype: jnp.dtype | None, tensor: int = 1
) -> int:
    """Memory in bytes that one image takes on a device beside the weights, at the least: of the three below, which
    follow each other, the one that takes most.

    Guidance makes two rows of an image in the transformer; its cache and logits are split over `tensor` devices.
    """
    width = jnp.dtype(dtype or jnp.float32).itemsize
    # Nothing reads the last scale's keys and values again, where that has one iteration.
    positions = config.context_tokens + config.num_tokens - 1 - config.sizes[-1]
    cache = 2 * 2 * config.depth * positions * config.width * width // tensor
    logits = 2 * config.sizes[-1] * config.vocab_size * FLOAT32 // tensor
    # The scores of attention at the lowest resolution; input and output of a convolution at the highest.
    scores = config.sizes[-1] ** 2 * FLOAT32
    widest = 2 * area_of(tokenizer.image_size) * tokenizer.channels * tokenizer.channel_multipliers[0] * width
    return max(cache, logits, scores, widest)


def free_bytes(device: jax.Device) -> int | None:
    """What a device has left; None where it does not say."""
    if device.platform == "cpu":
        return available_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def check_memory(
    config: TransformerConfig, tokenizer: TokenizerConfig, dtype: jnp.dtype | None, device: jax.Device, tensor: int = 1
) -> None:
    """Raises `UserError` where one image of these settings cannot fit into what the device has left."""
    needed, free = bytes_of_one(config, tokenizer, dtype, tensor), free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"size {size_text(tokenizer.image_shape)}: one image takes {needed / GIB:,.1f} GiB or more, and "
            f"{free / GIB:,.1f} GiB are free; give a smaller size"
        )
