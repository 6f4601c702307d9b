"""What an evaluation asks of a frozen network: features of pictures, and a name that says which network it was.

Letters: B pictures of H by W pixels, F features, K classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Features(NamedTuple):
    """Of each picture, float32."""

    features_BF: jax.Array
    logits_BK: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network.

    Attributes:
      name: as results name it, "EfficientNet-Lite0" say.
      standard: whether it is the InceptionV3 whose Frechet distance is called FID.
      digest: 16 hexadecimal digits of its weights.
      width: F.
      params: its parameters, arrays on the host.
      apply: (params, uint8 pictures BHWC in RGB, of any one size) to their `Features`; pure, to be compiled. It does
        the resizing and scaling that belong to the network.
    """

    name: str
    standard: bool
    digest: str
    width: int
    params: Any
    apply: Callable[[Any, jax.Array], Features]
