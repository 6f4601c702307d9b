"""Sizes of images as a user gives them, "768x1152" or "2:3": width first, as programs for images have it.

Elsewhere a shape is (height, width).
"""

import itertools
import math
import operator
import re
from typing import TypeVar

from hart_jax.config.model import HasScales, TokenizerConfig
from hart_jax.config.scales import MOST_ELONGATED, Shape, area_of, check_ratio
from hart_jax.errors import UserError

# "WIDTHxHEIGHT" in pixels, "W:H" at the model's own number of pixels, or (width, height).
Size = str | tuple[int, int]
Config = TypeVar("Config", bound=HasScales)


def at_shape(config: Config, shape: Shape, downsampling: int) -> Config:
    """A network's settings for images of this height and width in pixels, multiples of the tokenizer's factor.

    Raises:
      UserError: such an image is beyond 4:1, or has too few tokens for the scales.
    """
    return config.of_latent(shape[0] // downsampling, shape[1] // downsampling)


def parse_size(text: str) -> Shape:
    """Height and width in pixels of "WIDTHxHEIGHT"; `UserError` for anything else."""
    found = re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if not found:
        raise UserError(f"size {text!r}: write WIDTHxHEIGHT in pixels, like 768x1152, or a ratio like 2:3")
    return int(found[2]), int(found[1])


def parse_ratio(text: str) -> Shape:
    """Height and width, as they relate, of "W:H"; `UserError` for anything else, or beyond 4:1."""
    found = re.fullmatch("([1-9][0-9]{0,5}):([1-9][0-9]{0,5})", text)
    if not found:
        raise UserError(f"ratio {text!r}: write it as width:height in whole numbers, like 2:3")
    ratio = int(found[2]), int(found[1])
    check_ratio(ratio, f"ratio {text}")
    return ratio


def shape_of_ratio(ratio: Shape, config: TokenizerConfig) -> Shape:
    """Height and width in pixels of an image with this ratio (height, width) and about as many pixels as the model's.

    The rule: the exact sides have the ratio and the number of pixels; each is rounded to the nearest multiple of the
    tokenizer's factor. Where that is beyond 4:1, the shorter one is rounded up.
    """
    tokens = area_of(config.patch_nums[-1])
    sides = [round(math.sqrt(tokens * one / other)) for one, other in (ratio, ratio[::-1])]
    height, width = (max(side, -(-max(sides) // MOST_ELONGATED)) for side in sides)
    return height * config.downsampling, width * config.downsampling


def one_size(size: str | None, aspect_ratio: str | None) -> str | None:
    """What `--size` and `--aspect_ratio` ask for together; None where neither is given.

    Raises:
      UserError: both are given, or the ratio is none.
    """
    if aspect_ratio is None:
        return size
    if size is not None:
        raise UserError("--aspect_ratio: a --size has a ratio already; give one of them")
    parse_ratio(aspect_ratio)
    return aspect_ratio


def image_shape_of(size: Size | None, config: TokenizerConfig) -> Shape:
    """Height and width in pixels of a size that the user gives; None: the model's own.

    Raises:
      UserError: it is none, or not one that the model can have: beyond 4:1, too small, or no multiple of the
        tokenizer's factor.
    """
    if size is None:
        return config.image_shape
    if isinstance(size, str) and ":" in size:
        shape, name = shape_of_ratio(parse_ratio(size), config), f"ratio {size}"
    else:
        shape = parse_size(size) if isinstance(size, str) else _of_pair(size)
        name = f"size {size_text(shape)}"
    check_shape(shape, config, name)
    return shape


def size_text(shape: Shape) -> str:
    """ "WIDTHxHEIGHT" of a height and width."""
    return f"{shape[1]}x{shape[0]}"


def check_shape(shape: Shape, config: TokenizerConfig, name: str) -> None:
    """Raises `UserError`, which names what works, where a model cannot have images of this height and width."""
    factor = config.downsampling
    check_ratio(shape, name)
    if shape[0] % factor or shape[1] % factor:
        tall, wide = ((side // factor * factor, -(-side // factor) * factor) for side in shape)
        works = [each for each in dict.fromkeys(itertools.product(tall, wide)) if _works(each, config)]
        works.sort(key=lambda each: math.dist(each, shape))
        fix = " or ".join(map(size_text, works[:2] or [_smallest(shape, config)]))
        raise UserError(f"{name}: height and width must be multiples of {factor} px; give {fix}")
    if not _works(shape, config):
        fix = f"give {size_text(_smallest(shape, config))} or more"
        raise UserError(f"{name}: too small for the {len(config.patch_nums)} scales of the model; {fix}")


def _of_pair(size: object) -> Shape:
    try:
        width, height = map(operator.index, size)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        width, height = 0, 0
    if min(width, height) < 1:
        raise UserError(f'size {size!r}: give "768x1152", "2:3", or width and height in pixels, (768, 1152)')
    return height, width


def _works(shape: Shape, config: TokenizerConfig) -> bool:
    try:
        at_shape(config, shape, config.downsampling)
    except UserError:
        return False
    return True


def _smallest(shape: Shape, config: TokenizerConfig) -> Shape:
    """The smallest larger one of about the same ratio that works."""
    for longer in itertools.count(max(shape) // config.downsampling + 1):
        height, width = (config.downsampling * -(-side * longer // max(shape)) for side in shape)
        if _works((height, width), config):
            return height, width
    raise AssertionError("a large enough one works")
