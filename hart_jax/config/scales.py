"""Scale lists: how high and wide each scale is, in tokens, and the lists of other shapes that a square one becomes."""

import itertools
import math
from collections.abc import Sequence

from hart_jax.errors import UserError

Shape = tuple[int, int]  # height, width
# Of a square its side, as settings write it, or height and width.
Scale = int | Shape

MOST_ELONGATED = 4


def shape_of(scale: Scale) -> Shape:
    """Height and width of an entry of a list."""
    return (scale, scale) if isinstance(scale, int) else scale


def as_setting(shape: Shape) -> Scale:
    """As settings write it: of a square, its side."""
    return shape[0] if shape[0] == shape[1] else shape


def as_list(scales: Sequence[Scale], name: str) -> tuple[Scale, ...]:
    """A list as settings write it; `UserError` where an entry is neither a number nor two."""
    for scale in scales:
        sides = scale if isinstance(scale, tuple) and len(scale) == 2 else (scale,)
        if not all(type(side) is int for side in sides):
            raise UserError(f"{name}={scales}: {scale!r} is no side, nor (height, width), in tokens")
    return tuple(as_setting(shape_of(scale)) for scale in scales)


def area_of(scale: Scale) -> int:
    """Tokens, or pixels, of an entry."""
    return math.prod(shape_of(scale))


def check_ratio(shape: Shape, name: str) -> None:
    """Raises `UserError` for what is more than four times as long as wide."""
    if max(shape) > MOST_ELONGATED * min(shape):
        raise UserError(f"{name}: at most {MOST_ELONGATED}:1 is possible, high or wide")


def scale_shapes(base: Sequence[Scale], height: int, width: int) -> tuple[Shape, ...]:
    """The scales of a latent of `height` x `width` tokens, as many as `base` has, coarse to fine.

    The rule: (1) Where the latent has another area than the last scale of `base`, all sides are raised to the power
    that makes the last one's area that of the latent, and rounded; each stays larger than the one before. (2) Each
    scale keeps its area, as nearly as whole numbers next to its exact sides allow, in the ratio of the latent; of
    shapes equally near, the one nearest to that ratio. A side is at least 1, and no scale is smaller, in any direction,
    than the one before. (3) The last is the latent.

    So a square of the list's own size gives the list; and a latent on its side gives each scale on its side.

    Raises:
      UserError: the latent is more than 4 times as long as wide, or has too few tokens for so many scales.
    """
    last = (height, width)
    check_ratio(last, f"{height} x {width} tokens")
    shapes: list[Shape] = []
    for area in _stretched_areas(base, last):
        shapes.append(_shape_of_area(area, shapes[-1] if shapes else (1, 1), last))
    shapes.append(last)
    if any(a == b for a, b in itertools.pairwise(shapes)):
        raise _too_small(base, last)
    return tuple(shapes)


def _stretched_areas(base: Sequence[Scale], last: Shape) -> list[int]:
    """Of all scales but the last."""
    if math.prod(last) == area_of(base[-1]):
        return [area_of(scale) for scale in base[:-1]]
    power = math.log(max(1, math.prod(last))) / math.log(area_of(base[-1]))
    sides: list[int] = []
    for scale in base[:-1]:
        sides.append(max(round(math.sqrt(area_of(scale)) ** power), sides[-1] + 1 if sides else 1))
    if area_of(sides[-1]) >= math.prod(last):
        raise _too_small(base, last)
    return list(map(area_of, sides))


def _shape_of_area(area: int, least: Shape, last: Shape) -> Shape:
    """The shape of about this area with about the ratio of `last`, in no direction smaller than `least`."""
    ratio = last[0] / last[1]
    high = math.sqrt(area * ratio)
    # A side below 1 is 1, and the other has the whole area.
    exact = (1.0, float(area)) if high < 1 else (float(area), 1.0) if area / high < 1 else (high, area / high)

    def cost(shape: Shape) -> tuple[float, float, float]:
        elongated = math.log(shape[0] / shape[1])
        return abs(math.prod(shape) - area), round(abs(elongated - math.log(ratio)), 9), -abs(elongated)

    # An exact side that is whole, but for rounding, has itself alone beside it.
    near = [(math.floor(side + 1e-9), math.ceil(side - 1e-9)) for side in exact]
    heights, widths = (
        [min(max(side, low), most) for side in found] for found, low, most in zip(near, least, last, strict=True)
    )
    return min(itertools.product(heights, widths), key=cost)


def _too_small(base: Sequence[Scale], last: Shape) -> UserError:
    return UserError(f"{last[0]} x {last[1]} tokens are too few for {len(base)} scales: give a larger size")


def nearest_levels(scales: Sequence[Scale], base: Sequence[Scale]) -> tuple[int, ...]:
    """For each scale of a list, which scale of `base` is nearest by side (in the ratio of the sides); the smaller of
    two."""
    sides = [math.log(area_of(scale)) for scale in base]
    return tuple(
        min(range(len(base)), key=lambda level: abs(sides[level] - math.log(area_of(scale)))) for scale in scales
    )
