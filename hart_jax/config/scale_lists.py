"""Which list of scales is sampled: one that the model was trained on or, where that is asked for, another."""

import re
from collections.abc import Sequence

from hart_jax.config.model import TransformerConfig, check_ends
from hart_jax.config.scales import Scale, shape_of
from hart_jax.errors import UserError

# A number of scales, or the scales; none: the model's `patch_nums`.
Scales = int | tuple[Scale, ...]


def parse_scales(text: str) -> Scales:
    """The number of scales in "5", or the sides in "1,2,4,8"; `UserError` for anything else."""
    if not re.fullmatch("[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", text):
        raise UserError(f"scales {text!r}: give a number of scales, like 5, or their sides in tokens, like 1,2,4,8")
    sides = tuple(map(int, text.split(",")))
    return sides if len(sides) > 1 else sides[0]


def fewer_scales(base: Sequence[Scale], count: int) -> tuple[Scale, ...]:
    """A list of `count` scales of `base`, from its first to its last.

    The rule: they are spread evenly over `base`. Scale k of `count` is that of number k * (S - 1) / (count - 1) of the
    S of `base`, rounded to the nearest, halves up.

    Raises:
      UserError: `count` is not in 2..S.
    """
    last = len(base) - 1
    if not 2 <= count <= len(base):
        raise UserError(f"scales={count}: the model has {len(base)} scales; give a number from 2 to that")
    # Whole numbers, so that a half is one.
    return tuple(base[(2 * k * last + count - 1) // (2 * (count - 1))] for k in range(count))


def list_of(scales: Scales, config: TransformerConfig, untrained: bool = False) -> tuple[Scale, ...]:
    """The list that `scales` stand for, of a model with these settings.

    A number stands for the trained list of so many scales; where there is none, `untrained` gives `fewer_scales`.

    Raises:
      UserError: the model was not trained on such a list, and `untrained` does not ask for one; or there can be none.
    """
    by_count = {len(each): each for each in config.lists}
    if isinstance(scales, int):
        found = by_count.get(scales) or fewer_scales(config.patch_nums, scales)
    else:
        found = scales or config.patch_nums
        check_ends(found, config.patch_nums, "scales")
    if not untrained and found not in config.lists:
        trained = ", ".join(f"{list_text(each)} ({len(each)} scales)" for each in config.lists)
        what = f"{scales} scales" if isinstance(scales, int) else f"the scales {list_text(scales)}"
        raise UserError(
            f"scales: the model was not trained on {what}; it was on {trained}. Give one of these, or "
            "--untrained_scales (untrained_scales=True) to try all the same"
        )
    return found


def list_text(scales: Sequence[Scale]) -> str:
    """ "1,2,4" of squares; of others height and width, "1,2x3"."""
    return ",".join("x".join(map(str, dict.fromkeys(shape_of(scale)))) for scale in scales)
