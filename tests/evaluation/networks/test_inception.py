"""FID's InceptionV3 with random weights, against pytorch-fid and against numbers that pytorch-fid gave."""

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.inception import load_inception, resized
from tests.evaluation.networks.random_inception import inception_layers, inception_tensors

# Of `_images(2, 64, 90)` with `inception_tensors`, from pytorch-fid 0.3.0: features 30, 230, ..., logits 0, 100, ...
FEATURES = (
    (3.7398977, 0.0589379, 0.2710828, 2.8644729, 2.6202235, 0.0115260, 0.0012565, 2.6478689, 0.2633484, 1.0221480,
     8.6445980),
    (4.5588579, 0.0938467, 0.2890534, 4.0255184, 2.9740651, 0.0013321, 0.0, 3.2727430, 0.2575960, 1.1855569,
     10.9588740),
)  # fmt: skip
LOGITS = (
    (2.5179996, 3.7754874, -0.0459503, -8.1803100, 0.4413557, -1.8241280, 2.6075554, -3.7388058, -3.2063375, 8.6663200,
     -4.9419484),
    (2.8099608, 4.5642900, 0.2866296, -10.0688360, 0.5567420, -2.6546001, 3.2256810, -4.3903000, -3.6868706, 10.2511020,
     -5.6760883),
)  # fmt: skip


def _images(count, height, width):
    """Waves of growing frequency in two directions, uint8."""
    index, row, column, channel = np.ogrid[:count, :height, :width, :3]
    row, column = row / height, column / width
    waves = np.sin(9 * (index + 1) * row + channel) + np.sin((14 - 5 * index) * column * (1 + row) - channel * index)
    return np.uint8(np.round(127.5 + 63 * waves))


@pytest.fixture(scope="module")
def tensors():
    return inception_tensors()


@pytest.fixture(scope="module")
def network(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.npz"
    np.savez(path, **tensors)
    return load_inception(path)


@pytest.fixture(scope="module")
def apply(network):
    """Features and logits: it gives no textures."""
    compiled = jax.jit(lambda params, images: network.apply(params, images)[:2])
    return lambda images: compiled(network.params, images)


def test_features_and_logits_are_those_of_pytorch_fid(network, apply):
    features, logits = apply(_images(2, 64, 90))
    assert features.shape == (2, network.width) == (2, 2048)
    assert logits.shape == (2, 1008)
    assert features.dtype == logits.dtype == np.float32
    np.testing.assert_allclose(features[:, 30::200], FEATURES, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[:, ::100], LOGITS, rtol=1e-4, atol=1e-4)
    assert (network.name, network.standard) == ("InceptionV3", True)


def test_images_do_not_see_their_batch(apply):
    images = _images(2, 64, 90)
    together = apply(images)
    for part, backwards, alone in zip(together, apply(images[::-1]), apply(images[1:]), strict=True):
        np.testing.assert_allclose(backwards[::-1], part, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(alone, part[1:], rtol=1e-5, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(64, 90), (340, 311)])
def test_a_pth_gives_what_pytorch_fid_gives(tensors, network, size, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("pytorch_fid")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # The operators in PyPI's torchvision are for CUDA's PyTorch; beside a CPU's, it wants their names all the same.
        operators = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from pytorch_fid import inception

    counts = {f"{name}.bn.num_batches_tracked": torch.tensor(1) for name, _ in inception_layers()}
    state = counts | {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    torch.save(state, tmp_path / "weights.pth")
    ours = load_inception(tmp_path / "weights.pth")
    assert ours.digest == network.digest

    images = _images(2, *size)
    with torch.no_grad():
        (theirs,) = inception.InceptionV3().eval()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
        features = theirs[:, :, 0, 0]
        logits = features @ state["fc.weight"].T
    for got, expected in zip(jax.jit(ours.apply)(ours.params, images)[:2], (features, logits), strict=True):
        # Against what tells the two images apart, which is less than the features themselves.
        difference = np.linalg.norm(expected[0] - expected[1])
        assert np.linalg.norm(got - expected.numpy()) < 1e-4 * difference


@pytest.mark.parametrize("size", [(40, 53), (299, 299), (640, 301)])
@pytest.mark.parametrize(("resize", "offset"), [("pytorch-fid", 0.5), ("tensorflow", 0.0)])
def test_linear_resizing_is_interpolation_between_pixels(resize, offset, size):
    images = _images(2, *size)
    expected = images.astype(np.float64)
    for axis, pixels in enumerate(size, 1):
        points = (np.arange(299) + offset) * pixels / 299 - offset
        expected = np.apply_along_axis(
            lambda line, at: np.interp(at, np.arange(len(line)), line), axis, expected, points
        )
    expected = expected / 127.5 - 1 if resize == "pytorch-fid" else expected / 128 - 1
    np.testing.assert_allclose(resized(images, resize), expected, atol=2e-6)


@pytest.mark.parametrize("size", [(40, 53), (299, 299), (640, 301)])
def test_clean_resizing_is_that_of_pillow(size):
    # Steps between black and white, where the filter overshoots.
    images = np.uint8(255) * (_images(2, *size) > 127)
    expected = np.empty((2, 299, 299, 3))
    for index, channel in np.ndindex(2, 3):
        plane = Image.fromarray(images[index, :, :, channel].astype(np.float32))
        expected[index, :, :, channel] = plane.resize((299, 299), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(resized(images, "clean-fid"), expected.clip(0, 255) / 128 - 1, atol=2e-4)


@pytest.mark.usefixtures("compile_well")
@pytest.mark.parametrize("resize", ["pytorch-fid", "tensorflow", "clean-fid"])
def test_gray_stays_gray(resize):
    for size in ((8, 13), (299, 299), (500, 333)):
        values = [np.asarray(resized(np.full((1, *size, 3), gray, np.uint8), resize)) for gray in (0, 128, 255)]
        white = 1 if resize == "pytorch-fid" else 127 / 128
        for value, expected in zip(values, (-1, 1 / 255 if resize == "pytorch-fid" else 0, white), strict=True):
            np.testing.assert_allclose(value, expected, atol=1e-6)


def test_other_files_of_the_same_tensors_load_alike(tensors, network, tmp_path):
    """With the classifier for training and the counters of batches, which no feature depends on."""
    more = {
        "AuxLogits.fc.weight": np.ones((1008, 768), np.float32),
        "Mixed_6b.branch1x1.bn.num_batches_tracked": np.array(7),
    }
    save_file(tensors | more, tmp_path / "weights.safetensors")
    same = load_inception(tmp_path / "weights.safetensors", resize="clean-fid")
    assert same.digest == network.digest
    assert same.name != network.name
    jax.tree.map(np.testing.assert_array_equal, same.params, network.params)


def test_digest_tells_weights_apart(tensors, network, tmp_path):
    bias = tensors["Mixed_7c.branch_pool.bn.bias"] + np.float32(1e-3)
    save_file(tensors | {"Mixed_7c.branch_pool.bn.bias": bias}, tmp_path / "weights.safetensors")
    assert load_inception(tmp_path / "weights.safetensors").digest != network.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # What torchvision's own weights for ImageNet have.
        ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"'fc\.weight' has shape \(1000, 2048\)"),
        ({"Mixed_7c.branch_pool.bn.bias": None}, r"'Mixed_7c\.branch_pool\.bn\.bias' is missing"),
        ({"Mixed_8a.conv.weight": np.zeros(1, np.float32)}, r"no tensor 'Mixed_8a\.conv\.weight'"),
    ],
)
def test_other_networks_are_user_errors(tensors, tmp_path, change, message):
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    save_file(changed, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=rf"weights\.safetensors: .*{message}.*; get pt_inception"):
        load_inception(tmp_path / "weights.safetensors")


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path.read_bytes()


def test_damaged_files_and_unknown_resizings_are_user_errors(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(UserError, match=r"weights\.npz: no such .*; get pt_inception"):
        load_inception(path)
    whole = bytearray(_npz(path, weights=np.arange(1000)))
    flipped = whole.copy()
    flipped[len(flipped) // 2] ^= 1
    np.save(tmp_path / "array.npy", np.arange(10))
    array = (tmp_path / "array.npy").read_bytes()
    pickled = _npz(path, weights=np.array([{}]))
    for content in (b"", b"not an archive", whole[: len(whole) // 2], flipped, array, pickled):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.npz: damaged.*; get pt_inception"):
            load_inception(path)
    (tmp_path / "weights.pth").write_bytes(b"not of PyTorch")
    with pytest.raises(UserError, match=r"weights\.pth: damaged.*; get pt_inception"):
        load_inception(tmp_path / "weights.pth")
    with pytest.raises(UserError, match="resize is 'bilinear'; choose one of pytorch-fid, tensorflow, clean-fid"):
        load_inception(path, resize="bilinear")
