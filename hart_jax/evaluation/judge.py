"""Networks that judge pictures, and the features that they have seen, kept on disk."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from hart_jax.errors import UserError
from hart_jax.evaluation.concept_retrieval.blurred_copies import blurred_copies
from hart_jax.evaluation.networks.base import FeatureNetwork
from hart_jax.evaluation.networks.clip import Clip, load_clip
from hart_jax.evaluation.networks.efficientnet import load_efficientnet
from hart_jax.evaluation.networks.inception import Resize, load_inception
from hart_jax.evaluation.parts import Compiled, Rows, rows_of
from hart_jax.evaluation.pictures import Pictures
from hart_jax.evaluation.scores import COLUMNS, Seen, seen_by
from hart_jax.io.cache_dir import cache_folder


@dataclasses.dataclass(frozen=True)
class Judge:
    """A network, compiled, that sees sets of pictures at `size` px (0: as they are stored).

    What it saw is kept in `keep`, or for the next time in the user's cache, under a digest of the pictures, the size
    and the network's weights.
    """

    network: FeatureNetwork
    size: int
    batch_size: int

    def function(self, *, blurred: bool) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
        """Of the network's parameters and pictures, or their blurred copies, to be compiled."""

        def seen(params: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
            return seen_by(self.network, params, blurred_copies(images_BHWC) if blurred else images_BHWC)

        return seen

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return Compiled("features", self.function(blurred=False), self.network.params)

    @functools.cached_property
    def _compiled_blurred(self) -> Compiled:
        return Compiled("features, blurred", self.function(blurred=True), self.network.params)

    def see(self, pictures: Pictures, title: str, keep: Path | None = None, *, blurred: bool = False) -> Seen:
        """The features of all pictures, or of their blurred copies, in every process."""
        return Seen.of(self.rows(pictures, title, keep, blurred=blurred), pictures.abouts)

    def rows(self, pictures: Pictures, title: str, keep: Path | None = None, *, blurred: bool = False) -> Rows:
        known = [pictures.digest, self.size, self.network.name, self.network.digest, COLUMNS]
        compiled, name = self._compiled, f"{title}, {self.network.name}"
        if blurred:
            known.append("softened")
            compiled, name = self._compiled_blurred, f"{title}, blurred, {self.network.name}"
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        cache = cache_folder() if keep is None else None
        keep = cache / "features" if cache else keep
        return rows_of(pictures, self.size, compiled, keep and keep / key, batch_size=self.batch_size, title=name)


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks of an evaluation: those whose features are compared, and CLIP with its part that sees pictures."""

    features: tuple[Judge, ...]
    clip: tuple[Clip, Judge] | None = None


def load_judges(
    inception: str | None,
    efficientnet: str | None,
    clip: str | None,
    *,
    size: int,
    batch_size: int,
    resize: Resize = "pytorch-fid",
) -> Judges:
    """The networks in these files, each as its loader takes them; None or empty for none. `resize` is InceptionV3's.

    Raises:
      UserError: no network at all, or a file that is not of its network.
    """
    if not (inception or efficientnet or clip):
        raise UserError("no network to judge with: give --inception=FILE, --efficientnet=FILE or --clip=FOLDER")
    networks = [load_inception(inception, resize=resize)] if inception else []
    networks += [load_efficientnet(efficientnet)] if efficientnet else []
    found = load_clip(clip) if clip else None
    return Judges(
        tuple(Judge(network, size, batch_size) for network in networks),
        (found, Judge(found.images, size, batch_size)) if found else None,
    )
