"""Scale lists of one model: which ones a config may name, and which one is sampled."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.config import HartExperiment, SampleConfig, TransformerConfig
from hart_jax.config.scale_lists import fewer_scales, list_of, list_text, parse_scales
from hart_jax.errors import UserError
from tests.tiny import experiment_values, transformer_config

BASE = (1, 2, 3, 4, 6, 8)
FIVE, FOUR = (1, 2, 4, 6, 8), (1, 2, 4, 8)
LISTS = TransformerConfig(patch_nums=BASE, scale_lists=(FIVE, FOUR))


@given(st.integers(2, 20), st.integers(0, 18))
def test_fewer_scales_are_spread_evenly_from_the_first_to_the_last(count, more):
    base = tuple(range(1, count + more + 1))
    scales = fewer_scales(base, count)
    assert len(scales) == count and set(scales) <= set(base)
    assert (scales[0], scales[-1]) == (base[0], base[-1])
    steps = [b - a for a, b in itertools.pairwise(scales)]
    assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    if not more:
        assert scales == base


def test_fewer_scales_round_halves_up():
    assert fewer_scales(BASE, 5) == (1, 2, 4, 6, 8)
    assert fewer_scales(BASE, 4) == (1, 3, 4, 8)
    # 9/2 and 27/2 are halves.
    assert fewer_scales((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 7) == (1, 3, 4, 6, 8, 13, 16)
    assert fewer_scales(((1, 1), (1, 2), (3, 4)), 2) == ((1, 1), (3, 4))
    for count in (1, 7, 0, -2):
        with pytest.raises(UserError, match=f"scales={count}: the model has 6 scales; give a number from 2 to that"):
            fewer_scales(BASE, count)


def test_a_number_or_sides_are_read():
    assert (parse_scales("5"), parse_scales("1,2,4,8")) == (5, (1, 2, 4, 8))
    for text in ("", "0", "1,", "1;2", "1,2x3", "-4", "1, 2", "five"):
        with pytest.raises(UserError, match="give a number of scales, like 5, or their sides"):
            parse_scales(text)


def test_the_list_of_a_number_is_the_trained_one():
    assert LISTS.lists == (BASE, FIVE, FOUR)
    assert [list_of(count, LISTS) for count in (6, 5, 4)] == [BASE, FIVE, FOUR]
    assert list_of((), LISTS) == BASE and list_of(FOUR, LISTS) == FOUR
    # Of a trained list the number means that one, also where others are allowed.
    assert list_of(4, LISTS, untrained=True) == FOUR != fewer_scales(BASE, 4)
    assert list_of(3, LISTS, untrained=True) == fewer_scales(BASE, 3)
    assert list_of((1, 5, 8), LISTS, untrained=True) == (1, 5, 8)


@pytest.mark.parametrize(
    ("scales", "untrained", "message"),
    [
        (3, False, r"scales: the model was not trained on 3 scales; it was on 1,2,3,4,6,8 \(6 scales\), 1,2,4,6,8 "),
        ((1, 3, 8), False, r"not trained on the scales 1,3,8; it was on .*, 1,2,4,8 \(4 scales\)\. Give one of these"),
        ((1, 2, 7), False, r"scales: \(1, 2, 7\) must begin with 1 and end with 8, as patch_nums does"),
        ((2, 8), True, r"scales: \(2, 8\) must begin with 1 and end with 8"),
        ((1, 4, 4, 8), True, "needs two or more sides in tokens, increasing"),
        (9, True, "scales=9: the model has 6 scales"),
        (1, True, "scales=1: the model has 6 scales"),
    ],
)
def test_lists_that_are_not_sampled(scales, untrained, message):
    with pytest.raises(UserError, match=message):
        list_of(scales, LISTS, untrained)


def test_an_error_tells_of_rectangles_by_height_and_width():
    assert list_text((1, (2, 3), (4, 4))) == "1,2x3,4"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (((1, 2, 4),), r"scale_lists: \(1, 2, 4\) must begin with 1 and end with 8, as patch_nums does"),
        (((2, 8),), "must begin with 1"),
        (((1, 4, 3, 8),), "needs two or more sides in tokens, increasing"),
        (((8,),), "needs two or more sides in tokens"),
        ((BASE,), r"has 6 scales; give each list fewer than the 6 of patch_nums, and another number than the other"),
        (((1, 2, 3, 4, 5, 6, 8),), "has 7 scales; give each list fewer than the 6 of patch_nums"),
        ((FOUR, (1, 3, 6, 8)), r"\(1, 3, 6, 8\) has 4 scales"),
        (((1, 2.5, 8),), "scale_lists"),
        ((1, 2, 8), "expected"),
    ],
)
def test_lists_that_a_model_cannot_be_trained_on(lists, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig.from_dict({"patch_nums": BASE, "scale_lists": lists})


def test_lists_are_written_where_there_are_some_and_read_again():
    alone = TransformerConfig(patch_nums=BASE)
    assert "scale_lists" not in alone.to_dict() and alone.lists == (BASE,)
    written = json.loads(json.dumps(LISTS.to_dict()))
    assert written["scale_lists"] == [list(FIVE), list(FOUR)]
    assert TransformerConfig.from_dict(written) == LISTS
    # The same parameters serve both, so that a stage may add a list.
    alone.check_same(LISTS, "x", "transformer")
    LISTS.check_same(alone, "x", "transformer")
    with pytest.raises(UserError, match="depth"):
        alone.check_same(TransformerConfig(patch_nums=BASE, depth=3), "x", "transformer")


def test_a_config_at_one_list_has_no_more_of_them():
    assert LISTS.of_list(FOUR).scale_lists == () and LISTS.of_latent(6, 12).scale_lists == ()
    assert LISTS.of_list(FOUR).each_level == (0, 1, 3, 5) and LISTS.of_list(BASE).each_level == tuple(range(6))
    # A list of a list stands for the same scales.
    assert LISTS.of_list(FIVE).of_list((1, 3, 8)).each_level == (0, 3, 5)
    assert LISTS.of_list(FOUR).of_list(FOUR) == LISTS.of_list(FOUR)
    tall = LISTS.of_list(FOUR).of_latent(12, 6)
    assert tall.each_level == (0, 1, 3, 5) and tall.num_levels == 6 and len(tall.shapes) == 4


def test_the_scales_of_a_sampler_are_a_setting_of_its_images():
    assert "scales" not in SampleConfig().to_dict()
    assert SampleConfig(scales=4).image_settings()["scales"] == 4
    listed = SampleConfig.from_dict({"scales": [1, [2, 2], [4, 8], 8]})
    assert listed.scales == (1, 2, (4, 8), 8)
    assert SampleConfig.from_dict(json.loads(json.dumps(listed.to_dict()))) == listed
    assert SampleConfig(scales=4).of_model(LISTS).scales == FOUR
    # The model's own list is none of its own.
    assert SampleConfig(scales=6).of_model(LISTS) == SampleConfig(scales=BASE).of_model(LISTS) == SampleConfig()
    for wrong in ((3, 2), (1,), (0, 4)):
        with pytest.raises(UserError, match=r"scales=.*needs two or more sides"):
            SampleConfig(scales=wrong)
    with pytest.raises(UserError, match=r"SampleConfig.scales='4': expected int or"):
        SampleConfig.from_dict({"scales": "4"})


def test_an_experiment_refuses_scales_that_none_of_its_models_can_have():
    values = experiment_values()
    experiment = HartExperiment.from_dict({**values, "sample": {**values["sample"], "scales": 2}})
    at_list = experiment.sampled()
    assert at_list.transformer == transformer_config().of_list((1, 4)) and at_list.sample.scales == ()
    assert at_list.tokenizer == experiment.tokenizer.of_list((1, 4)) and at_list.tokenizer.image_size == 8
    with pytest.raises(UserError, match="scales=5: the model has 3 scales"):
        HartExperiment.from_dict({**values, "sample": {**values["sample"], "scales": 5}})
