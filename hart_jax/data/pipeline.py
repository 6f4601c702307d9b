"""Batches from shards, with Grain: shuffled, resized, one caption each, resumable to the exact batch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from hart_jax.config.scales import Scale, area_of, as_setting, shape_of
from hart_jax.data.aspect_buckets import AspectBuckets, BucketOrder
from hart_jax.data.bad_records import BadRecords
from hart_jax.data.batches import Batches, BucketBatches, ProcessRows
from hart_jax.data.image_files import cropped_image
from hart_jax.data.shards import Folders, RecordSource, as_paths
from hart_jax.errors import UserError
from hart_jax.io.host_memory import GIB, available_bytes

TextFunction = Callable[[str], Mapping[str, np.ndarray]]
TokenFunction = Callable[[int], Mapping[str, np.ndarray]]


@runtime_checkable
class PlacedText(Protocol):
    """What a caption's arrays are found by where they lie beside it."""

    def at(self, index: int, number: int) -> Mapping[str, np.ndarray]:
        """Of caption `number` of record `index`."""
        ...


_SIDED_WORDS = re.compile(r"\b(left|right|leftwards|rightwards|left-facing|right-facing)\b")
_CHANNELS = 3


class ImageSource:
    """Random access to {image: uint8 (H, W, 3), captions, index, label} of shard folders.

    All images have one size, or each that of its bucket. With `cache`, each resized image is kept in memory (H x W x 3
    bytes) and decoded only once.
    """

    def __init__(
        self, shards: Folders, image_size: Scale, *, buckets: AspectBuckets | None = None, cache: bool = False
    ):
        self.records = RecordSource(shards)
        count = len(self.records)
        self._buckets = buckets or AspectBuckets.of_one_size(image_size, count)
        self._known: list[dict[str, Any] | None] = [None] * count if cache else []
        if cache:
            _check_memory(self._buckets)
        # Pages are only taken from the system when an image is written to them.
        shapes = [(number, *shape) for number, shape in zip(self._buckets.counts, self._buckets.shapes, strict=True)]
        self._images = [np.empty((*shape, _CHANNELS), np.uint8) for shape in shapes] if cache else []
        self._cache = cache

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = int(index)
        bucket = self._buckets.of_record[index]
        known = self._known[index] if self._cache else None
        if known is not None:
            image = self._images[bucket][self._buckets.places[index]]
        else:
            record = self.records[index]
            known = _without_image(record)
            try:
                image = cropped_image(record["image"], self._buckets.shapes[bucket])
            except UserError as error:
                raise UserError(f"image {record['id']!r} of the shards: {error}") from error
            if self._cache:
                self._images[bucket][self._buckets.places[index]] = image
                # Set last: another thread that sees this finds the image complete.
                self._known[index] = known
        return {"image": image, **known, "index": np.int32(index)}


def _check_memory(buckets: AspectBuckets) -> None:
    kept = list(zip(buckets.counts, buckets.shapes, strict=True))
    needed, free = sum(count * area_of(shape) * _CHANNELS for count, shape in kept), available_bytes()
    if needed > free:
        told = " and ".join(f"{count} images of {as_setting(shape)} px" for count, shape in kept)
        raise UserError(
            f"data.cache=True keeps {told}, {needed / GIB:.1f} GiB, and this machine has {free / GIB:.1f} GiB left: "
            "set data.cache=False, and data.workers to as many as decode fast enough"
        )


class TokenSource:
    """Random access to {captions, index, label, and what `tokens` gives for the index}: no image is read."""

    def __init__(self, shards: Folders, tokens: TokenFunction):
        self.records = RecordSource(shards)
        # Here, so that a worker does not have to make it.
        self._captions, self._tokens = self.records.captions, tokens

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = int(index)
        about = self._captions[index]
        if about is None:
            # Reading it says what is wrong.
            known = _without_image(self.records[index])
        else:
            known = _without_image({"captions": about.captions, **self.records.label_of(about.category)})
        return {**self._tokens(index), **known, "index": np.int32(index)}


def _without_image(record: dict[str, Any]) -> dict[str, Any]:
    label = {"label": np.int32(record["label"])} if "label" in record else {}
    return {"captions": record["captions"], **label}


class ReplacingSource:
    """Random access to some of a source's items, by their places among `numbers`, the next readable one of them
    instead of one that is not; `wanted` is the number of the one that was asked for.

    A place is so filled with the same image in every run and process.
    """

    def __init__(self, source: ImageSource | TokenSource, numbers: Sequence[int] | np.ndarray, attempts: int):
        self._source, self._numbers, self._attempts = source, numbers, attempts

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> dict[str, Any]:
        numbers, count = self._numbers, len(self)
        wanted = {"wanted": np.int32(numbers[int(place)])}
        for number in range(int(place), int(place) + self._attempts):
            try:
                return {**self._source[numbers[number % count]], **wanted}
            except UserError:
                continue
        return {**self._source[numbers[(int(place) + self._attempts) % count]], **wanted}


def make_loader(
    shards: Folders,
    *,
    weights: Sequence[float] = (),
    image_size: Scale,
    buckets: AspectBuckets | None = None,
    batch_size: int,
    seed: int = 0,
    train: bool = True,
    text: TextFunction | PlacedText | None = None,
    tokens: TokenFunction | None = None,
    flip: bool = False,
    cache: bool = False,
    rows: Sequence[int] | None = None,
    workers: int = 0,
    epochs: int | None = None,
    max_bad_records: int = 100,
) -> Batches:
    """Iterates over batches of one or several shard folders.

    For training, images come in a new order each epoch, forever, each with one of its captions at random; both depend
    on `seed` and the position alone: batch k of all processes together is the same images however many processes there
    are. Otherwise images come once, in order, with their prompts, the last batch possibly smaller.

    Args:
      shards: folder, or folders, written by `hart_jax.data.shards`.
      weights: in training, the share of each folder in the batches; each then has epochs of its own. Without, all
        folders are shuffled together.
      image_size: height and width of the images, or the side of squares.
      buckets: in training, those of the records: each batch then has images of one, at its size instead of
        `image_size`. Which one is drawn from the seed, in proportion to the images.
      batch_size: B, of all processes together.
      seed: of order, captions and flips.
      train: as described above.
      text: caption -> arrays that join the batch (token ids, masks or text embeddings), or the same by the caption's
        place; must be picklable with `workers`.
      tokens: image number -> arrays that stand in the batch instead of `image`, or `UserError` for one that does not
        decode; must be picklable with `workers`; not with `flip`.
      flip: mirror every second training image, except where the caption says left or right.
      cache: keep the resized images in memory; without `workers` only.
      rows: in training, the n rows of each batch that this process has, ascending; None for all of them.
      workers: processes that decode; 0 decodes in threads.
      epochs: passes over the images; None is without end for training, one otherwise. Buckets have no common ones.
      max_bad_records: in training, how many records may not decode; the next that does takes the place of each.

    Returns:
      An iterator of dicts: `image` uint8 (n, H, W, 3), `index` int32 (n,), the image's place in the shards, `label`
      int32 (n,), that of its category among the sorted ones, where the shards have labels, and what `text` gives,
      stacked to (n, ...); n is B without `rows`. With `buckets` also `bucket`, the number of the batch's.

    Raises:
      UserError: a bad argument, shards that are missing or damaged, or, while reading, images that do not decode.
    """
    _check_arguments(image_size, batch_size, workers, cache, epochs)
    if buckets and (not train or epochs is not None):
        raise UserError("buckets are for training without end: each has epochs of its own")
    if flip and tokens is not None:
        raise UserError("flip=True needs images; tokens computed ahead are of images as they are (set data.flip=False)")
    source: Any = (
        TokenSource(shards, tokens) if tokens else ImageSource(shards, image_size, buckets=buckets, cache=cache)
    )
    records = source.records
    if train and len(source) < batch_size:
        named = ", ".join(map(str, as_paths(shards)))
        raise UserError(f"batch_size {batch_size} is more than the {len(source)} images in {named}")
    folders = len(records.folder_starts) - 1
    if weights and (len(weights) != folders or min(weights) <= 0):
        raise UserError(f"weights {tuple(weights)} must be above 0, one for each of the {folders} folders")
    if not train:
        # A slice takes all; Grain derives a step's seed from the number of steps before it, which must stay.
        items = grain.MapDataset.source(source)[:]
        views = (items.repeat(epochs) if epochs is not None else items).map(_plain_view)
        examples = views.map(_AddText(text)).batch(batch_size, drop_remainder=False)
        return Batches(examples, workers, records.name_of, max_bad_records)
    rows = range(batch_size) if rows is None else rows
    given = buckets or AspectBuckets.of_one_size(image_size, len(source))
    given.check_full(batch_size)
    shares = given.shares(records.folder_starts, weights)
    parts = []
    for bucket, numbers in enumerate(given.records):
        items = grain.MapDataset.source(ReplacingSource(source, numbers, max_bad_records))
        if weights:
            ends = np.searchsorted(numbers, records.folder_starts)
            items = _mixed(items, ends, shares[bucket], seed + bucket * folders)
        else:
            items = items.seed((seed + bucket) % 2**32).shuffle()
        views = items[:].repeat(epochs).random_map(_RandomView(flip))
        parts.append(ProcessRows(views.map(_AddText(text)), batch_size, rows).batch(len(rows), drop_remainder=True))
    order = BucketOrder(seed, tuple(shares.sum(axis=1).tolist()))
    batches = BucketBatches(parts, order) if buckets else parts[0]
    return Batches(batches, workers, records.name_of, max_bad_records)


def _mixed(items: grain.MapDataset, ends: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Items of several folders, between `ends`, each shuffled for itself; folders without any are left out."""
    there = [number for number in range(len(weights)) if ends[number] < ends[number + 1]]
    parts = [items[ends[number] : ends[number + 1]].seed((seed + number) % 2**32).shuffle() for number in there]
    return grain.MapDataset.mix(parts, [weights[number] for number in there])


def load_captions(shards: Folders, max_bad_records: int = 0) -> list[str]:
    """All distinct captions of shard folders, sorted: the order for text embeddings computed ahead.

    Raises:
      UserError: naming some, if more than `max_bad_records` records are damaged; fewer are left out with a warning.
    """
    records, captions = RecordSource(shards), set[str]()
    bad = BadRecords(records.name_of, max_bad_records, "its captions are left out")
    for index in range(len(records)):
        about = records.captions[index]
        if about is None:
            bad.add(index)
        else:
            captions.update(about.captions)
    return sorted(captions)


def some_captions(shards: Folders, count: int) -> list[str]:
    """First captions of so many records, evenly spaced, each once; damaged records are left out."""
    captions = RecordSource(shards).captions
    places = np.linspace(0, len(captions) - 1, min(count, len(captions))).astype(int).tolist()
    return list(dict.fromkeys(about.captions[0] for place in places if (about := captions[place]) is not None))


class _RandomView:
    """Picks one caption and perhaps mirrors the image."""

    def __init__(self, flip: bool):
        self._flip = flip

    def __call__(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        captions = item.pop("captions")
        number = rng.integers(len(captions))
        caption = captions[number]
        # Drawn in any case, so that captions do not depend on the setting.
        if rng.random() < 0.5 and self._flip and not _SIDED_WORDS.search(caption):
            item["image"] = item["image"][:, ::-1]
        return {**item, "caption": caption, "number": int(number)}


def _plain_view(item: dict[str, Any]) -> dict[str, Any]:
    captions = item.pop("captions")
    return {**item, "caption": captions[0], "number": 0}


class _AddText:
    """Replaces the caption by the arrays that the text function makes of it."""

    def __init__(self, text: TextFunction | PlacedText | None):
        self._text = text

    def __call__(self, view: dict[str, Any]) -> dict[str, np.ndarray]:
        caption, number = view.pop("caption"), view.pop("number")
        if self._text is None:
            return view
        if isinstance(self._text, PlacedText):
            return {**view, **self._text.at(int(view["index"]), number)}
        return {**view, **self._text(caption)}


def _check_arguments(image_size: Scale, batch_size: int, workers: int, cache: bool, epochs: int | None) -> None:
    if min(shape_of(image_size)) < 1 or batch_size < 1:
        raise UserError(f"image_size {image_size} and batch_size {batch_size} must be at least 1")
    if workers < 0 or (workers and cache):
        raise UserError(f"workers {workers} must be 0 with cache=True (each would keep its own) and never negative")
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs {epochs} must be at least 1, or None")
