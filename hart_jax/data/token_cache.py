"""Tokens of all training images, computed once and kept on disk: the tokenizer then costs a training step nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hart_jax.config import TokenizerConfig
from hart_jax.config.sizes import at_shape
from hart_jax.data.aspect_buckets import AspectBuckets
from hart_jax.data.bad_records import BadRecords
from hart_jax.data.disk_cache import fitting, new_cache, open_cache, read_column
from hart_jax.data.pipeline import ImageSource, TokenFunction
from hart_jax.data.precomputed import describe_indices, index_type
from hart_jax.data.shards import Folders, as_paths, checksums
from hart_jax.errors import UserError
from hart_jax.io.fingerprint import sha256
from hart_jax.io.images import from_uint8
from hart_jax.parallel.program import Program
from hart_jax.tokenizer.model import Tokenizer
from hart_jax.tokenizer.quantizer import Tokens

BATCH = 64
COMPLETE_FILE = "complete.json"
# Fields of `Tokens`: `indices` are kept in the narrowest type that holds V of them, the others as float16.
FIELDS = ("indices", "f_rest", "ar_input")


class TokenMaker:
    """Images (n, H, W, 3) uint8, n <= BATCH, -> the `FIELDS` of their tokens as they are kept, with n rows each.

    Raises:
      UserError: from a call, if a value does not fit its type.
    """

    def __init__(self, config: TokenizerConfig, params):
        tokenizer = Tokenizer(config)
        self._types = {"indices": index_type(config.vocab_size), "f_rest": np.float16, "ar_input": np.float16}
        self._params = params

        def encode(params: Any, image: jax.Array) -> Tokens:
            return tokenizer.apply({"params": params}, from_uint8(image), method="tokens")

        self.encode = Program("tokens ahead", encode)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        # A full batch each time, so that one compilation serves all.
        full = np.concatenate([images, np.zeros((BATCH - len(images), *images.shape[1:]), np.uint8)])
        tokens = jax.device_get(self.encode(self._params, full))
        values = {
            "indices": np.concatenate(tokens.indices, axis=1),
            "f_rest": tokens.f_rest_BPC,
            "ar_input": tokens.ar_input_BLC,
        }
        return {
            name: fitting(values[name][: len(images)], dtype, f"tokens' {name}") for name, dtype in self._types.items()
        }


class TokenCache:
    """image number -> {"indices": (L,) int32, "f_rest": (P, C), "ar_input": (L-1, C) float16}; P, L as in `Tokens`.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError, EOFError, KeyError, TypeError: it is damaged.
      UserError: when asked for an image that did not decode.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        about = json.loads((folder / COMPLETE_FILE).read_text())
        self._bad = frozenset(about.get("bad", ()))
        self._columns = {name: read_column(folder / f"{name}.npy", about["images"]) for name in FIELDS}

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        if index in self._bad:
            raise UserError(f"image {index} of the shards did not decode when its tokens were computed")
        row = {name: np.asarray(column[index]) for name, column in self._columns.items()}
        return {**row, "indices": row["indices"].astype(np.int32)}

    def __reduce__(self) -> tuple:
        # A worker opens the files; pickling a mapped one would read it all.
        return TokenCache, (self._folder,)


class BucketTokens:
    """As `TokenCache`, of images in buckets, each of which has a cache of its own in the order of its images."""

    def __init__(self, caches: Sequence[TokenCache], buckets: AspectBuckets):
        self._caches, self._buckets = tuple(caches), buckets

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self._caches[self._buckets.of_record[index]](int(self._buckets.places[index]))


def cache_tokens(
    config: TokenizerConfig,
    params,
    shards: Folders,
    folder: Path,
    max_bad_records: int = 0,
    buckets: AspectBuckets | None = None,
) -> TokenFunction:
    """The cache of shard folders' images under this tokenizer in `folder`, computed unless it is complete already.

    Images are not mirrored; with `buckets`, each has the size of its bucket, and tokens of this size. Interrupted work
    is done again, and a damaged cache, with a warning. That of another tokenizer, of other shards or of other buckets
    has another name.

    Raises:
      UserError: naming some, if more than `max_bad_records` images do not decode; fewer are left out with a warning. Or
        the disk is full; nothing is left then.
    """
    source = ImageSource(shards, config.image_size, buckets=buckets)
    bad = BadRecords(source.records.name_of, max_bad_records, "it gets no tokens")
    known = [checksums(path).decode() for path in as_paths(shards)]

    def cached(config: TokenizerConfig, numbers: np.ndarray, *among: np.ndarray) -> TokenCache:
        about = json.dumps([config.to_dict(), *known, *describe_indices(config.vocab_size).values()])
        own = folder / sha256(about, *map(np.asarray, jax.tree.leaves(params)), *among)[:16]
        cache = open_cache(own, TokenCache, "tokens")
        return _filled(config, params, source, numbers, own, bad) if cache is None else cache

    if buckets is None:
        return cached(config, np.arange(len(source)))
    configs = [at_shape(config, shape, config.downsampling) for shape in buckets.shapes]
    return BucketTokens(list(map(cached, configs, buckets.records, buckets.records)), buckets)


def _filled(
    config: TokenizerConfig, params, source: ImageSource, numbers: np.ndarray, folder: Path, bad: BadRecords
) -> TokenCache:
    """The new cache, in `folder`, of these images of a source."""
    tokens_of, count = TokenMaker(config, params), len(numbers)
    without = []
    with new_cache(folder, count) as (new, write), tqdm(total=count, desc="tokens", mininterval=5) as bar:
        for start in range(0, count, BATCH):
            places = range(start, min(start + BATCH, count))
            images = np.zeros((len(places), *config.image_shape, 3), np.uint8)
            for row, place in enumerate(places):
                try:
                    images[row] = source[numbers[place]]["image"]
                except UserError:
                    bad.add(int(numbers[place]))
                    without.append(place)
            write(**tokens_of(images))
            bar.update(len(places))
        (new / COMPLETE_FILE).write_text(json.dumps({"images": count, "bad": without}))
    return TokenCache(folder)
