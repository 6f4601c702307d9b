import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hart_jax.evaluation.metrics.codebook import Usage

SIZES, VOCAB = (1, 4, 9), 8


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (count, 14))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_counts_do_not_depend_on_batches_or_hosts(cut, count, seed):
    images = tokens(count, seed)
    whole, one, other = (Usage.empty(3, VOCAB).add(part, SIZES) for part in (images, images[:cut], images[cut:]))
    expected = np.zeros((3, VOCAB), np.int64)
    for row in images:
        for place, code in enumerate(row):
            expected[0 if place < 1 else 1 if place < 5 else 2, code] += 1
    for usage in (whole, one.merge(other), one.add(images[cut:], SIZES)):
        np.testing.assert_array_equal(usage.counts_SV, expected)
        assert usage.counts_SV.dtype == np.int64


def test_fractions_and_perplexity():
    # One token of scale 0, four different ones of scale 1, nine of scale 2 that are the same.
    usage = Usage.empty(3, VOCAB).add(np.array([[5, 0, 1, 2, 3, *[7] * 9]]), SIZES)
    np.testing.assert_allclose(usage.fraction_used.of_codebook_S, [1 / 8, 4 / 8, 1 / 8])
    np.testing.assert_allclose(usage.fraction_used.of_possible_S, [1, 1, 1 / 8])
    np.testing.assert_allclose(usage.perplexity_S, [1, 4, 1])
    uneven = Usage(np.array([[3, 1, 0, 0]]))
    np.testing.assert_allclose(uneven.perplexity_S, [4 / 3**0.75])


def test_no_images():
    usage = Usage.empty(3, VOCAB)
    for values in (*usage.fraction_used, usage.perplexity_S):
        np.testing.assert_array_equal(values, [0, 0, 0])


def test_other_tokens_are_refused():
    usage = Usage.empty(3, VOCAB)
    for wrong, sizes in ((tokens(2)[:, :13], SIZES), (tokens(2)[:, :5], (1, 4)), (tokens(2)[0], SIZES)):
        with pytest.raises(ValueError, match="counts 3 scales"):
            usage.add(wrong, sizes)
    for wrong in (tokens(1) - VOCAB, tokens(1) + VOCAB):
        with pytest.raises(ValueError, match="0 to 7"):
            usage.add(wrong, SIZES)
    with pytest.raises(ValueError, match="does not merge"):
        usage.merge(Usage.empty(2, VOCAB))
