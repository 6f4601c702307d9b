"""Networks whose features images are compared by, and those features, kept on disk."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from hart_jax.config.scales import Scale
from hart_jax.errors import UserError
from hart_jax.evaluation.concept_retrieval.blurred_copies import blurred_copies
from hart_jax.evaluation.feature_cache import DataParallel, FeatureRows, compute_features
from hart_jax.evaluation.images import ImageSet
from hart_jax.evaluation.networks.base import FeatureNetwork
from hart_jax.evaluation.networks.clip import Clip, load_clip
from hart_jax.evaluation.networks.efficientnet import load_efficientnet
from hart_jax.evaluation.networks.inception import Resize, load_inception
from hart_jax.evaluation.scores import COLUMNS, FeatureSet, feature_columns
from hart_jax.io.cache_dir import cache_folder
from hart_jax.io.fingerprint import json_digest


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A network, compiled, for sets of images at `size` px (0: as they are stored).

    Features are kept in `keep`, or for the next time in the user's cache, under a digest of the images, the size and
    the network's weights.
    """

    network: FeatureNetwork
    size: Scale
    batch_size: int

    def function(self, *, blurred: bool) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
        """Of the network's parameters and images, or their blurred copies, to be compiled."""

        def columns(params: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
            return feature_columns(self.network, params, blurred_copies(images_BHWC) if blurred else images_BHWC)

        return columns

    @functools.cached_property
    def _compiled(self) -> DataParallel:
        return DataParallel("features", self.function(blurred=False), self.network.params)

    @functools.cached_property
    def _compiled_blurred(self) -> DataParallel:
        return DataParallel("features, blurred", self.function(blurred=True), self.network.params)

    def extract(
        self, image_set: ImageSet, title: str, keep: Path | None = None, *, blurred: bool = False
    ) -> FeatureSet:
        """The features of all images, or of their blurred copies, in every process."""
        return FeatureSet.of(self.rows(image_set, title, keep, blurred=blurred), image_set.infos)

    def rows(self, image_set: ImageSet, title: str, keep: Path | None = None, *, blurred: bool = False) -> FeatureRows:
        known = [image_set.digest, self.size, self.network.name, self.network.digest, COLUMNS]
        compiled, name = self._compiled, f"{title}, {self.network.name}"
        if blurred:
            known.append("softened")
            compiled, name = self._compiled_blurred, f"{title}, blurred, {self.network.name}"
        key = json_digest(known)[:16]
        cache = cache_folder() if keep is None else None
        keep = cache / "features" if cache else keep
        return compute_features(
            image_set, self.size, compiled, keep and keep / key, batch_size=self.batch_size, title=name
        )


@dataclasses.dataclass(frozen=True)
class Evaluators:
    """The networks of an evaluation: those whose features are compared, and CLIP with its part that sees images."""

    extractors: tuple[FeatureExtractor, ...]
    clip: tuple[Clip, FeatureExtractor] | None = None


def load_evaluators(
    inception: str | None,
    efficientnet: str | None,
    clip: str | None,
    *,
    size: Scale,
    batch_size: int,
    resize: Resize = "pytorch-fid",
) -> Evaluators:
    """The networks in these files, each as its loader takes them; None or empty for none. `resize` is InceptionV3's.

    Raises:
      UserError: no network at all, or a file that is not of its network.
    """
    if not (inception or efficientnet or clip):
        raise UserError("no network to score with: give --inception=FILE, --efficientnet=FILE or --clip=FOLDER")
    networks = [load_inception(inception, resize=resize)] if inception else []
    networks += [load_efficientnet(efficientnet)] if efficientnet else []
    found = load_clip(clip) if clip else None
    return Evaluators(
        tuple(FeatureExtractor(network, size, batch_size) for network in networks),
        (found, FeatureExtractor(found.images, size, batch_size)) if found else None,
    )
