"""How many pictures a device draws at a time: what one takes, estimated, against what is free.

Beside the weights a picture takes its keys and values and what the last scale's layers and logits need, or, when these
are gone, the decoder's widest activations, which `SampleConfig.decode_at_once` bounds.
"""

import jax

from hart_jax.config import SampleConfig, TokenizerConfig, TransformerConfig
from hart_jax.io.host_memory import available_bytes
from hart_jax.planning.cost_model import BFLOAT16, FLOAT32, cache_bytes, passes
from hart_jax.sampling.sampler import pictures_decoded_at_once

# More do not draw faster.
MOST_PICTURES = 8
# Of the free memory; the rest is for what the estimate does not see.
SHARE = 0.9
# With what an accelerator's whole program adds to the cache and rearranges of it: about as compiled for TPUs
# (docs/pods.md), assumed of GPUs.
_CACHES = 2
# Arrays of the last scale's width or logits, and of the decoder's widest layer, that live at a time.
_WIDTHS, _LOGITS, _DECODED = 8, 6, 4


def picture_bytes(
    config: TransformerConfig, settings: SampleConfig, itemsize: int = BFLOAT16, platform: str = "cpu"
) -> int:
    """Of a picture while the transformer draws it; `itemsize` is that of the compute type, `platform` the device's."""
    rows, positions = 2, config.patch_nums[-1] ** 2
    last = passes(config, settings.masked_iterations)[-1]
    cache = cache_bytes(config, rows, last.cached) * itemsize // BFLOAT16
    if platform != "cpu":
        cache *= _CACHES
    layer = rows * positions * (_WIDTHS * config.width + 3 * config.mlp_width) * itemsize
    # A layer's keys and values in one piece.
    layer += rows * 2 * last.keys * config.width * itemsize
    return cache + max(layer, _LOGITS * positions * config.vocab_size * FLOAT32)


def decoder_bytes(config: TokenizerConfig, pictures: int) -> int:
    """Of decoding so many pictures at once, at the full side, where it is widest."""
    return _DECODED * pictures * config.image_size**2 * config.channels * config.channel_multipliers[0] * FLOAT32


def pictures_that_fit(
    transformer: TransformerConfig,
    tokenizer: TokenizerConfig,
    settings: SampleConfig,
    free: int,
    itemsize: int = BFLOAT16,
    platform: str = "cpu",
) -> int:
    """The most pictures, at most MOST_PICTURES and at least 1, that the estimate fits into so many free bytes."""
    for pictures in range(MOST_PICTURES, 1, -1):
        drawing = pictures * picture_bytes(transformer, settings, itemsize, platform)
        decoding = decoder_bytes(tokenizer, min(pictures, pictures_decoded_at_once(tokenizer, settings)))
        if max(drawing, decoding) <= SHARE * free:
            return pictures
    return 1


def free_bytes(device: jax.Device) -> int:
    """What is free on a device now; of a CPU, the memory that the system, or its container, has left for it."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        # One that does not say: of the smallest accelerators.
        return 8 * 2**30
    return available_bytes() // jax.local_device_count()
