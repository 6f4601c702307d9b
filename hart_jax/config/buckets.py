"""The sizes of `data.buckets`: of each ratio the shape of images."""

from collections.abc import Sequence

from hart_jax.config.model import TokenizerConfig
from hart_jax.config.scales import Shape
from hart_jax.config.sizes import at_shape, parse_ratio, shape_of_ratio, size_text
from hart_jax.errors import UserError


def bucket_shapes(buckets: Sequence[str], config: TokenizerConfig, name: str = "data.buckets") -> tuple[Shape, ...]:
    """Height and width in pixels of the images of each bucket.

    Args:
      name: what the user gave them as.

    Raises:
      UserError: two buckets give one shape, or one is none: malformed, beyond 4:1, or too small for the scales.
    """
    named: dict[Shape, str] = {}
    for bucket in buckets:
        try:
            shape = shape_of_ratio(parse_ratio(bucket), config)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        try:
            at_shape(config, shape, config.downsampling)
        except UserError:
            raise UserError(
                f"{name}: {bucket} gives {size_text(shape)}, too small for the {len(config.patch_nums)} scales of the "
                "model; leave it out"
            ) from None
        if shape in named:
            raise UserError(f"{name}: {named[shape]} and {bucket} both give {size_text(shape)}; leave one of them out")
        named[shape] = bucket
    return tuple(named)
