"""Batches from shards, with Grain: shuffled, resized, one caption each, resumable to the exact batch."""

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from hart_jax.data.shards import RecordSource
from hart_jax.errors import UserError

TextFunction = Callable[[str], Mapping[str, np.ndarray]]
_SIDED_WORDS = re.compile(r"\b(left|right|leftwards|rightwards|left-facing|right-facing)\b")
_CHANNELS = 3


def square_image(data: bytes, size: int) -> np.ndarray:
    """Decodes an image file to uint8 (size, size, 3): the centre square of its short side, resized with antialiasing.

    Transparent images are put on white. A side that is a multiple of `size` is averaged over whole blocks.

    Raises:
      UserError: the bytes are not an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image = file if file.mode == "RGB" else _on_white(file)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"image does not decode ({error})") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    if side % size == 0:
        square = image.reduce(side // size, box) if side > size else image.crop(box)
    else:
        square = image.resize((size, size), Image.Resampling.LANCZOS, box)
    return np.asarray(square, dtype=np.uint8)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


class PictureSource:
    """Random access to {image: uint8 (S, S, 3), captions, index} of a shard folder.

    With `cache`, each resized image is kept in memory (count x S x S x 3 bytes in all) and decoded only once.
    """

    def __init__(self, shards: str | Path, image_size: int, *, cache: bool = False):
        self._records = RecordSource(shards)
        self._size = image_size
        count = len(self._records)
        self._captions: list[list[str] | None] = [None] * count if cache else []
        # Pages are only taken from the system when an image is written to them.
        shape = (count if cache else 0, image_size, image_size, _CHANNELS)
        self._images = np.empty(shape, np.uint8)
        self._cache = cache

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = int(index)
        captions = self._captions[index] if self._cache else None
        if captions is not None:
            image = self._images[index]
        else:
            record = self._records[index]
            captions = record["captions"]
            try:
                image = square_image(record["image"], self._size)
            except UserError as error:
                raise UserError(f"image {record['id']!r} of the shards: {error}") from error
            if self._cache:
                self._images[index] = image
                # Set last: another thread that sees the captions finds the image complete.
                self._captions[index] = captions
        return {"image": image, "captions": captions, "index": np.int32(index)}


def make_loader(
    shards: str | Path,
    *,
    image_size: int,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    text: TextFunction | None = None,
    flip: bool = False,
    cache: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    epochs: int | None = None,
) -> grain.DatasetIterator:
    """Iterates over batches of a shard folder.

    For training, images come in a new order each epoch, forever, each with one of its captions at random; both depend
    on `seed` and the position alone. Otherwise they come once, in order, with their prompts, the last batch possibly
    smaller.

    Args:
      shards: folder written by `hart_jax.data.shards`.
      image_size: side S of the images.
      batch_size: B, of this process.
      seed: of order, captions and flips.
      train: as described above.
      text: caption -> arrays that join the batch (token ids, masks or text states); must be picklable with `workers`.
      flip: mirror every second training image, except where the caption says left or right.
      cache: keep the resized images in memory; without `workers` only.
      process_index: this process takes every `process_count`-th image, from here.
      process_count: number of processes that share the images.
      workers: processes that decode; 0 decodes in threads.
      epochs: passes over the images; None is without end for training, one otherwise.

    Returns:
      An iterator of dicts: `image` uint8 (B, S, S, 3), `index` int32 (B,), the image's place in the shards, and what
      `text` gives, stacked to (B, ...). Its `get_state` and `set_state` (or Orbax, through `grain.checkpoint`) continue
      with exactly the next batch.

    Raises:
      UserError: a bad argument, or shards that are missing or damaged.
    """
    _check_arguments(image_size, batch_size, process_index, process_count, workers, cache, epochs)
    source = PictureSource(shards, image_size, cache=cache)
    if train and len(source) // process_count < batch_size:
        raise UserError(f"batch_size {batch_size} is more than the {len(source) // process_count} images in {shards}")
    pictures = grain.MapDataset.source(source).seed(seed)
    if train:
        pictures = pictures.shuffle()
    pictures = pictures[process_index::process_count]
    if train or epochs is not None:
        pictures = pictures.repeat(epochs)
    chosen = pictures.random_map(_RandomView(flip)) if train else pictures.map(_plain_view)
    batches = chosen.map(_AddText(text)).batch(batch_size, drop_remainder=train)
    # A few batches ahead suffice: with a cache there is nothing to wait for.
    iterator = batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        # Grain reads an absl flag here, which fails in programs that never parse any (notebooks, tests).
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        iterator = iterator.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(iterator)


def load_captions(shards: str | Path) -> list[str]:
    """All distinct captions of a shard folder, sorted: the order for text states computed ahead."""
    records = RecordSource(shards)
    return sorted({caption for index in range(len(records)) for caption in records[index]["captions"]})


class _RandomView:
    """Picks one caption and perhaps mirrors the image."""

    def __init__(self, flip: bool):
        self._flip = flip

    def __call__(self, picture: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        caption = picture["captions"][rng.integers(len(picture["captions"]))]
        # Drawn in any case, so that captions do not depend on the setting.
        mirrored = rng.random() < 0.5 and self._flip and not _SIDED_WORDS.search(caption)
        image = picture["image"][:, ::-1] if mirrored else picture["image"]
        return {"image": image, "index": picture["index"], "caption": caption}


def _plain_view(picture: dict[str, Any]) -> dict[str, Any]:
    return {"image": picture["image"], "index": picture["index"], "caption": picture["captions"][0]}


class _AddText:
    """Replaces the caption by the arrays that the text function makes of it."""

    def __init__(self, text: TextFunction | None):
        self._text = text

    def __call__(self, view: dict[str, Any]) -> dict[str, np.ndarray]:
        caption = view.pop("caption")
        return view if self._text is None else {**view, **self._text(caption)}


def _check_arguments(
    image_size: int,
    batch_size: int,
    process_index: int,
    process_count: int,
    workers: int,
    cache: bool,
    epochs: int | None,
) -> None:
    if image_size < 1 or batch_size < 1:
        raise UserError(f"image_size {image_size} and batch_size {batch_size} must be at least 1")
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} must be from 0 to process_count - 1 = {process_count - 1}")
    if workers < 0 or (workers and cache):
        raise UserError(f"workers {workers} must be 0 with cache=True (each would keep its own) and never negative")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs {epochs} must be at least 1, or None")
