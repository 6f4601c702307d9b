"""Scale lists of other shapes: every property that the rule promises, at every ratio from 1:4 to 4:1."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hart_jax.config import TransformerConfig, read_experiment
from hart_jax.config.scales import Scale, Shape, area_of, nearest_levels, scale_shapes, shape_of
from hart_jax.errors import UserError

CONFIGS = ("hart_0p7b_256", "hart_0p7b_512", "hart_0p7b_1024", "emoji_hart")
LISTS = {name: read_experiment(f"configs/{name}.py").tokenizer.patch_nums for name in CONFIGS}
# Of rectangles, which a config may have too.
LISTS["rectangles"] = ((1, 1), (1, 2), (2, 3), (4, 6), (7, 10))
released = st.sampled_from(sorted(LISTS))


@st.composite
def latents(draw, most: int = 160) -> Shape:
    """Any height and width, neither more than 4 times the other."""
    height = draw(st.integers(1, most))
    return height, draw(st.integers(-(-height // 4), min(4 * height, most)))


def shapes_of(base: Sequence[Scale], latent: Shape) -> tuple[Shape, ...]:
    """The list; no example where the latent is too small for one."""
    try:
        return scale_shapes(base, *latent)
    except UserError as error:
        assert f"too few for {len(base)} scales" in str(error)
        assume(False)
        raise


@given(released, latents())
def test_a_list_grows_to_the_latent(name, latent):
    base = LISTS[name]
    shapes = shapes_of(base, latent)
    assert len(shapes) == len(base) and shapes[-1] == latent
    assert min(shapes[0]) >= 1 and len(set(shapes)) == len(shapes)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(shapes))


@given(released, latents())
def test_a_latent_on_its_side_has_each_scale_on_its_side(name, latent):
    shapes = shapes_of(LISTS[name], latent)
    assert scale_shapes(LISTS[name], *latent[::-1]) == tuple(shape[::-1] for shape in shapes)


@given(released, st.integers(2, 96))
def test_squares_stay_squares(name, side):
    """Every one of them a square, whatever the list's own size is."""
    assume(name != "rectangles")
    assert all(height == width for height, width in shapes_of(LISTS[name], (side, side)))


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_own_shape_gives_the_list(name):
    base = LISTS[name]
    assert scale_shapes(base, *shape_of(base[-1])) == tuple(map(shape_of, base))


def elongations(base: Sequence[Scale]) -> list[Shape]:
    """Latents of every ratio with as many tokens as the list's last scale, but for one in 60."""
    area = area_of(base[-1])
    highs = range(math.isqrt(area // 4), math.isqrt(4 * area) + 1)
    pairs = [(high, wide) for high in highs for wide in range(max(1, area // high - 3), area // high + 4)]
    return [latent for latent in pairs if max(latent) <= 4 * min(latent) and 60 * abs(math.prod(latent) - area) <= area]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_scale_keeps_its_area(name):
    """As nearly as whole numbers allow: at most a third more or less at 3x3, a twentieth from 16x16 on."""
    base = LISTS[name]
    tried = elongations(base)
    assert len(tried) >= 7 and {(wide, high) for high, wide in tried} == set(tried)
    for latent in tried:
        for ours, theirs in zip(scale_shapes(base, *latent), map(area_of, base), strict=True):
            bound = 1 / 3 if theirs <= 16 else 1 / 5 if theirs <= 49 else 1 / 8 if theirs < 256 else 1 / 20
            assert abs(math.prod(ours) / theirs - 1) <= bound, (latent, ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_neighbour_has_a_nearer_area(name):
    """Of the whole sides beside the exact ones, and between the scale before and the latent."""
    base = LISTS[name]
    for latent in elongations(base):
        shapes = scale_shapes(base, *latent)
        for before, ours, area in zip(((1, 1), *shapes), shapes[:-1], map(area_of, base), strict=False):
            exact = (math.sqrt(area * latent[0] / latent[1]), math.sqrt(area * latent[1] / latent[0]))
            for shape in itertools.product(*((math.floor(side), math.ceil(side)) for side in exact)):
                fits = all(low <= side <= most for low, side, most in zip(before, shape, latent, strict=True))
                assert not fits or abs(math.prod(ours) - area) <= abs(math.prod(shape) - area), (latent, ours, shape)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        ((4, 17), "4 x 17 tokens: at most 4:1 is possible"),
        ((65, 16), "65 x 16 tokens: at most 4:1 is possible"),
        ((5, 5), "5 x 5 tokens are too few for 10 scales: give a larger size"),
        ((1, 1), "1 x 1 tokens are too few for 10 scales"),
        ((0, 0), "0 x 0 tokens are too few for 10 scales"),
        ((14, 6), "14 x 6 tokens are too few for 10 scales"),
    ],
)
def test_latents_that_have_no_list(latent, message):
    with pytest.raises(UserError, match=message):
        scale_shapes(LISTS["hart_0p7b_256"], *latent)
    with pytest.raises(UserError, match=message):
        TransformerConfig().of_latent(*latent)


@given(released, latents())
def test_a_config_of_a_latent_reads_its_shapes(name, latent):
    base = LISTS[name]
    shapes = shapes_of(base, latent)
    config = TransformerConfig(patch_nums=base).of_latent(*latent)
    assert config.shapes == shapes and config.sizes == tuple(math.prod(shape) for shape in shapes)
    assert config.num_tokens == sum(config.sizes)
    assert [config.level_of(scale) for scale in range(len(shapes))] == list(range(config.num_levels))
    # There and back, and twice the same.
    assert config.of_latent(*latent) is config


def test_another_list_takes_the_levels_that_are_nearest_by_side():
    base = TransformerConfig()
    assert base.of_list(base.patch_nums) == base
    fewer = base.of_list((1, 2, 4, 6, 9, 16))
    # In the ratio of the sides 9 is nearer to 8 than to 10.
    assert fewer.levels == (0, 1, 3, 5, 7, 9) and fewer.num_levels == 10
    assert nearest_levels((2,), (1, 4)) == (0,)
    wide = fewer.of_latent(12, 21)
    assert wide.levels == fewer.levels and wide.shapes == scale_shapes(fewer.patch_nums, 12, 21)
