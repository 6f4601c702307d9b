"""What an evaluation asks of a frozen network: features of images, and a name that says which network it was.

Letters: B images of H by W pixels, F features, K classes, T textures.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.safetensors import check_finite
from hart_jax.io.state_dict import transpose_conv


class Features(NamedTuple):
    """Of each image, float32.

    Textures are means and standard deviations, over the image, of what the network's earlier layers see: strokes,
    shading, colours. They tell styles apart, which the features of a classifier are trained to overlook.
    """

    features_BF: jax.Array
    logits_BK: jax.Array | None = None
    textures_BT: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network.

    Attributes:
      name: as results name it, "EfficientNet-Lite0" say.
      standard: whether it is the InceptionV3 whose Frechet distance is called FID.
      digest: 16 hexadecimal digits of its weights.
      width: F.
      params: its parameters, arrays on the host.
      apply: (params, uint8 images BHWC in RGB, of any one size) to their `Features`; pure, to be compiled. It does
        the resizing and scaling that belong to the network.
    """

    name: str
    standard: bool
    digest: str
    width: int
    params: Any
    apply: Callable[[Any, jax.Array], Features]


def checked_tensors(
    stored: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    unused: Collection[str],
    *,
    source: str,
    network: str,
) -> dict[str, np.ndarray]:
    """Those of a file's tensors that `shapes` names, float32.

    Raises:
      UserError: one is missing or of another shape, or `stored` has a tensor that is neither among them nor `unused`;
        it begins with `source` and says that this is not `network`.
    """
    tensors = {key: np.asarray(stored[key], np.float32) for key in shapes if key in stored}
    for key, expected in shapes.items():
        tensor = tensors.get(key)
        if tensor is None or tensor.shape != expected:
            found = "is missing" if tensor is None else f"has shape {tensor.shape} instead of {expected}"
            raise UserError(f"{source}: not {network}, where tensor {key!r} {found}")
        check_finite(tensor, f"{source}: tensor {key!r}")
    left = sorted(set(stored) - set(shapes) - set(unused))
    if left:
        raise UserError(f"{source}: not {network}, which has no tensor {left[0]!r}")
    return tensors


def folded(weight_OIHW: np.ndarray, norm: Sequence[np.ndarray], epsilon: float) -> dict[str, np.ndarray]:
    """A convolution and the batch norm behind it as one convolution of Flax, multiplied in float64.

    `norm` are its weight, bias, running mean and variance.
    """
    gain_C, shift_C, mean_C, variance_C = (part.astype(np.float64) for part in norm)
    scale_C = gain_C / np.sqrt(variance_C + epsilon)
    kernel_HWIO = transpose_conv(weight_OIHW) * scale_C
    return {"kernel": kernel_HWIO.astype(np.float32), "bias": (shift_C - mean_C * scale_C).astype(np.float32)}
