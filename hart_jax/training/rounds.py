"""Images through a network in rounds: its first layers take much memory for each."""

from collections.abc import Callable
from typing import Any

import jax

from hart_jax.nn.rounds import in_rounds

# A device encodes so many pixels at a time: at 1024 px, the first layers of one image take 4 GB.
MAX_PIXELS = 2**20


def images_in_rounds(encode: Callable[[jax.Array], Any], image_BHWC: jax.Array) -> Any:
    """`encode` of images, a tree of arrays (B, ...), computed for `MAX_PIXELS` of each device at a time."""
    _, height, width, _ = image_BHWC.shape
    return in_rounds(encode, image_BHWC, max(1, MAX_PIXELS // (height * width)))
