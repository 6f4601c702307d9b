import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hart_jax.errors import UserError
from hart_jax.evaluation.metrics.moments import Moments

WIDTH = 5


def features(count: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return offset + rng.normal(size=(count, WIDTH)) @ rng.normal(size=(WIDTH, WIDTH))


def assert_same(ours: Moments, theirs: Moments, rtol: float = 1e-12) -> None:
    assert ours.count == theirs.count
    scale = np.abs(theirs.scatter_FF).max()
    np.testing.assert_allclose(ours.mean_F, theirs.mean_F, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(ours.scatter_FF, theirs.scatter_FF, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_covariance_is_that_of_numpy(offset):
    pictures = features(40, offset=offset)
    moments = Moments.empty(WIDTH)
    for start in range(0, 40, 7):
        moments = moments.add(pictures[start : start + 7])
    np.testing.assert_allclose(moments.mean_F, pictures.mean(axis=0), rtol=1e-14)
    # np.cov of the features with an offset has lost as many digits as they have.
    expected = np.cov(pictures - offset, rowvar=False)
    np.testing.assert_allclose(moments.covariance, expected, atol=1e-15 * max(1, offset) * np.abs(expected).max() * 10)
    np.testing.assert_array_equal(moments.covariance, moments.covariance.T)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 99), st.lists(st.booleans(), min_size=8))
def test_order_batches_and_hosts_do_not_matter(sizes, seed, hosts):
    pictures = features(sum(sizes), offset=3.0)
    shuffled = np.random.default_rng(seed).permutation(pictures)
    parts = [Moments.empty(WIDTH), Moments.empty(WIDTH)]
    for batch, host in zip(np.split(shuffled, np.cumsum(sizes)[:-1]), hosts, strict=False):
        parts[host] = parts[host].add(batch)
    assert_same(parts[0].merge(parts[1]), Moments.empty(WIDTH).add(pictures))


def test_float32_features_are_summed_in_float64():
    pictures = features(30).astype(np.float32)
    moments = Moments.empty(WIDTH).add(pictures)
    assert moments.mean_F.dtype == moments.scatter_FF.dtype == np.float64
    np.testing.assert_allclose(moments.covariance, np.cov(pictures.astype(np.float64), rowvar=False), rtol=1e-12)


def test_a_file_keeps_every_bit(tmp_path):
    moments = Moments.empty(WIDTH).add(features(6))
    np.savez(tmp_path / "moments.npz", **moments.to_arrays())
    with np.load(tmp_path / "moments.npz") as arrays:
        read = Moments.from_arrays(arrays)
    assert read.count == 6
    np.testing.assert_array_equal(read.mean_F, moments.mean_F)
    np.testing.assert_array_equal(read.scatter_FF, moments.scatter_FF)


def test_what_cannot_be_added_is_refused():
    moments = Moments.empty(WIDTH)
    with pytest.raises(ValueError, match=r"\(B, 5\)"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="5 and of 4"):
        moments.merge(Moments.empty(4))
    with pytest.raises(UserError, match="1 of 2 pictures"):
        moments.add(np.array([[0.0] * WIDTH, [0.0] * 4 + [np.nan]]))
    with pytest.raises(UserError, match="count=1"):
        _ = moments.add(np.zeros((1, WIDTH))).covariance
