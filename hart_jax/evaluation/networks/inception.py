"""The InceptionV3 of the Frechet inception distance (Heusel et al., arXiv 1706.08500) and of the inception score.

Its weights are TensorFlow's of 2015-12-05, with 1008 classes; FID is FID with these only. The network differs from the
one torchvision has in its pools: averages leave the border out, and the last block takes a maximum instead. Tensors
have torchvision's names, as the file that pytorch-fid downloads has them:

    https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth

Letters: B images, H by W pixels of 3 channels, C channels, F = 2048 features, K = 1008 classes.
"""

import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

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

Resize = Literal["pytorch-fid", "tensorflow", "clean-fid"]
Window = tuple[int, int]

# Side of the images the network was trained on.
SIDE = 299

_WIDTH, _CLASSES = 2048, 1008
_NORM = ("weight", "bias", "running_mean", "running_var")
_NORM_EPSILON = 1e-3
_FIX = "get pt_inception-2015-12-05-6726825d.pth from https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"

# The default would be lower on accelerators, and features would depend on the chip.
_PRECISION = jax.lax.Precision.HIGHEST


def load_inception(path: str | os.PathLike[str], *, resize: Resize = "pytorch-fid") -> FeatureNetwork:
    """FID's network.

    Args:
      path: pytorch-fid's `.pth`, or an `.npz` or `.safetensors` of the same tensors.
      resize: whose resizing `resized` imitates. Distances of one resizing do not compare with those of another, so one
        that is not pytorch-fid's is part of the network's name.

    Returns:
      A network of 2048 features, those of the last average pool, and 1008 logits without bias, as the inception score
      takes them. Its digest is that of the tensors used, in whichever of the three files they came.

    Raises:
      UserError: `resize` is unknown, or the file is missing, damaged, or holds another network.
    """
    if resize not in get_args(Resize):
        raise UserError(f"resize is {resize!r}; choose one of {', '.join(get_args(Resize))}")
    try:
        tensors = _read(local_copy(path))
    except UserError as error:
        raise UserError(f"{error}; {_FIX}") from error
    return FeatureNetwork(
        name="InceptionV3" if resize == "pytorch-fid" else f"InceptionV3 resizing as {resize}",
        standard=True,
        digest=weights_digest(tensors),
        width=_WIDTH,
        params=_folded(tensors),
        apply=functools.partial(features, resize=resize),
    )


def features(params: Any, images_BHWC: jax.Array, resize: Resize) -> Features:
    """`FeatureNetwork.apply`."""
    return InceptionV3().apply({"params": params}, resized(images_BHWC, resize))


def resized(images_BHWC: jax.Array, resize: Resize) -> jax.Array:
    """The network's input, (B, 299, 299, 3) float32 in [-1, 1].

    Args:
      images_BHWC: uint8.
      resize: "pytorch-fid" interpolates linearly between pixel centres and does not antialias; "tensorflow" (the first
        FID, torch-fidelity, torchmetrics) does the same but measures from the top left pixel, not from the image's
        edge; "clean-fid" (Parmar et al., arXiv 2104.11222) is an antialiased bicubic filter. The last two end at
        127/128.
    """
    x_BHWC = images_BHWC.astype(jnp.float32)
    if resize == "clean-fid":
        x_BHWC = jax.image.resize(x_BHWC, (len(x_BHWC), SIDE, SIDE, 3), "cubic", precision=_PRECISION)
        return (jnp.clip(x_BHWC, 0, 255) - 128) / 128
    offset = 0.5 if resize == "pytorch-fid" else 0.0
    for axis in (1, 2):
        x_BHWC = _interpolated(x_BHWC, axis, offset)
    return x_BHWC / 127.5 - 1 if resize == "pytorch-fid" else (x_BHWC - 128) / 128


def _interpolated(x_BHWC: jax.Array, axis: int, offset: float) -> jax.Array:
    """`axis` at 299 points; a pixel's value lies `offset` of a pixel inside it."""
    last = x_BHWC.shape[axis] - 1
    points = np.clip((np.arange(SIDE) + offset) * (last + 1) / SIDE - offset, 0, last)
    low = np.floor(points).astype(np.int32)
    share = jnp.expand_dims(jnp.asarray(points - low, jnp.float32), [other for other in range(4) if other != axis])
    below, above = (jnp.take(x_BHWC, index, axis) for index in (low, np.minimum(low + 1, last)))
    return below + (above - below) * share


class InceptionV3(nn.Module):
    """Szegedy et al., arXiv 1512.00567, with batch norms folded into the convolutions; for inference."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> Features:
        """(B, 299, 299, 3) float32 in [-1, 1] to the last average pool and the logits without bias."""
        x_BHWC = _conv(x_BHWC, "Conv2d_1a_3x3", 32, (3, 3), stride=2)
        x_BHWC = _conv(x_BHWC, "Conv2d_2a_3x3", 32, (3, 3), padding="VALID")
        x_BHWC = _conv(x_BHWC, "Conv2d_2b_3x3", 64, (3, 3))
        x_BHWC = _halved(x_BHWC)
        x_BHWC = _conv(x_BHWC, "Conv2d_3b_1x1", 80)
        x_BHWC = _conv(x_BHWC, "Conv2d_4a_3x3", 192, (3, 3), padding="VALID")
        x_BHWC = _halved(x_BHWC)
        x_BHWC = _Mixed5(32, name="Mixed_5b")(x_BHWC)
        x_BHWC = _Mixed5(64, name="Mixed_5c")(x_BHWC)
        x_BHWC = _Mixed5(64, name="Mixed_5d")(x_BHWC)
        x_BHWC = _Mixed6a(name="Mixed_6a")(x_BHWC)
        x_BHWC = _Mixed6(128, name="Mixed_6b")(x_BHWC)
        x_BHWC = _Mixed6(160, name="Mixed_6c")(x_BHWC)
        x_BHWC = _Mixed6(160, name="Mixed_6d")(x_BHWC)
        x_BHWC = _Mixed6(192, name="Mixed_6e")(x_BHWC)
        x_BHWC = _Mixed7a(name="Mixed_7a")(x_BHWC)
        x_BHWC = _Mixed7(_averaged, name="Mixed_7b")(x_BHWC)
        x_BHWC = _Mixed7(_maximum, name="Mixed_7c")(x_BHWC)
        features_BF = jnp.mean(x_BHWC, axis=(1, 2))
        return Features(features_BF, nn.Dense(_CLASSES, use_bias=False, precision=_PRECISION, name="fc")(features_BF))


class _Mixed5(nn.Module):
    """35 by 35 positions."""

    pool_width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return _joined(
            _conv(x_BHWC, "branch1x1", 64),
            _branch(x_BHWC, "branch5x5", (48, (1, 1)), (64, (5, 5))),
            _branch(x_BHWC, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            _conv(_averaged(x_BHWC), "branch_pool", self.pool_width),
        )


class _Mixed6a(nn.Module):
    """From 35 by 35 positions to 17 by 17."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return _joined(
            _conv(x_BHWC, "branch3x3", 384, (3, 3), stride=2),
            _branch(x_BHWC, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), stride=2),
            _halved(x_BHWC),
        )


class _Mixed6(nn.Module):
    """17 by 17 positions."""

    inner_width: int

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        row, column = (self.inner_width, (1, 7)), (self.inner_width, (7, 1))
        point = (self.inner_width, (1, 1))
        return _joined(
            _conv(x_BHWC, "branch1x1", 192),
            _branch(x_BHWC, "branch7x7", point, row, (192, (7, 1))),
            _branch(x_BHWC, "branch7x7dbl", point, column, row, column, (192, (1, 7))),
            _conv(_averaged(x_BHWC), "branch_pool", 192),
        )


class _Mixed7a(nn.Module):
    """From 17 by 17 positions to 8 by 8."""

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return _joined(
            _branch(x_BHWC, "branch3x3", (192, (1, 1)), (320, (3, 3)), stride=2),
            _branch(x_BHWC, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)), stride=2),
            _halved(x_BHWC),
        )


class _Mixed7(nn.Module):
    """8 by 8 positions."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        single_BHWC = _branch(x_BHWC, "branch3x3", (384, (1, 1)))
        double_BHWC = _branch(x_BHWC, "branch3x3dbl", (448, (1, 1)), (384, (3, 3)))
        return _joined(
            _conv(x_BHWC, "branch1x1", 320),
            _conv(single_BHWC, "branch3x3_2a", 384, (1, 3)),
            _conv(single_BHWC, "branch3x3_2b", 384, (3, 1)),
            _conv(double_BHWC, "branch3x3dbl_3a", 384, (1, 3)),
            _conv(double_BHWC, "branch3x3dbl_3b", 384, (3, 1)),
            _conv(self.pool(x_BHWC), "branch_pool", 192),
        )


def _conv(
    x_BHWC: jax.Array, name: str, width: int, window: Window = (1, 1), stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    """Convolution and ReLU; strides of 2 leave out what a border would pad."""
    padding = padding if stride == 1 else "VALID"
    return nn.relu(nn.Conv(width, window, stride, padding, precision=_PRECISION, name=name)(x_BHWC))


def _branch(x_BHWC: jax.Array, name: str, *layers: tuple[int, Window], stride: int = 1) -> jax.Array:
    """Convolutions one after another, of (width, window) each; the stride is the last one's."""
    for number, (width, window) in enumerate(layers, 1):
        x_BHWC = _conv(x_BHWC, f"{name}_{number}", width, window, stride if number == len(layers) else 1)
    return x_BHWC


def _joined(*branches_BHWC: jax.Array) -> jax.Array:
    return jnp.concatenate(branches_BHWC, axis=-1)


_halved = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_maximum = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
_averaged = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)


@functools.cache
def _layers() -> dict[str, tuple[int, ...]]:
    """Shape of every kernel, HWIO or (in, out), by the name of its layer, `Mixed_5b.branch1x1` say."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    params = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_dict(params, sep=".").items()}
    return {name.removesuffix(".kernel"): shape for name, shape in shapes.items() if name.endswith(".kernel")}


def _read(path: Path) -> dict[str, np.ndarray]:
    """The tensors used, float32, by torchvision's names."""
    stored = _open_npz(path) if path.suffix == ".npz" else open_tensors(path)
    # The classifier that helped training, and the bias that the inception score leaves out.
    unused = ["fc.bias", *(key for key in stored if key.startswith("AuxLogits."))]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _layers().items():
        if name == "fc":
            shapes["fc.weight"] = shape[::-1]
            continue
        shapes[f"{name}.conv.weight"] = (*shape[:1:-1], *shape[:2])
        shapes |= {f"{name}.bn.{part}": shape[3:] for part in _NORM}
        unused.append(f"{name}.bn.num_batches_tracked")
    return checked_tensors(stored, shapes, unused, source=str(path), network="FID's InceptionV3")


def _folded(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `InceptionV3`; each batch norm is multiplied into its convolution, in float64."""
    params: dict[str, Any] = {"fc": {"kernel": tensors["fc.weight"].T}}
    for name in set(_layers()) - {"fc"}:
        norm = [tensors[f"{name}.bn.{part}"] for part in _NORM]
        params[name] = folded(tensors[f"{name}.conv.weight"], norm, _NORM_EPSILON)
    return unflatten_dict(params, sep=".")


def _open_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    try:
        with zipfile.ZipFile(path) as members:
            check_unpacked(path, [info.file_size for info in members.infolist()])
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged, or no .npz of arrays ({error})") from error
