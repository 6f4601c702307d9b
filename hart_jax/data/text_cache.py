"""Text embeddings of all captions, computed once and kept on disk as float16."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from hart_jax.data.disk_cache import fitting, new_cache, open_cache, read_column
from hart_jax.io.fingerprint import sha256
from hart_jax.text.encoder import TextEncoder

BATCH = 256


@dataclass(frozen=True)
class CaptionTokens:
    """caption -> {"input_ids": (N,), "mask": (N,)} int32, what text embeddings are computed from; picklable."""

    encoder: TextEncoder
    length: int

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        input_ids, mask, _ = self.encoder.tokenize([caption], self.length)
        return {"input_ids": input_ids[0], "mask": mask[0]}


def embed_captions(encoder: TextEncoder, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """States (n, T, D) float16 and mask (n, T) int32 of n <= BATCH captions, and how many were cut to T = `length`."""
    # A full batch each time, so that one compilation serves all.
    encoded = encoder([*captions, *[captions[0]] * (BATCH - len(captions))], length)
    count = len(captions)
    states = fitting(np.asarray(encoded.states_BTD)[:count], np.float16, "text embeddings")
    return states, encoded.mask_BT[:count], sum(encoded.truncated[:count])


def caption_keys(captions: Sequence[str]) -> np.ndarray:
    """128 bits of each caption's digest, (n, 2) uint64: two captions never share them."""
    digests = "".join(sha256(caption.encode("utf-8", "surrogatepass"))[:32] for caption in captions)
    return np.frombuffer(bytes.fromhex(digests), "<u8").reshape(-1, 2)


class TextCache:
    """caption -> {"text": (T, D) float16, "mask": (T,) int32}, from the files that `cache_texts` wrote.

    All files stay on disk until a row is asked for: many workers read one cache.

    Raises:
      FileNotFoundError: the folder has none.
      ValueError, EOFError: it is damaged.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        # (n, 3), sorted by the first half of the keys: the two halves, and the row of the states.
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        if self._keys.ndim != 2 or self._keys.shape[1] != 3:
            raise ValueError(f"keys.npy has shape {self._keys.shape}")
        self._states = read_column(folder / "states.npy", len(self._keys))
        self._masks = read_column(folder / "masks.npy", len(self._keys))

    def __call__(self, caption: str) -> dict[str, np.ndarray]:
        row = self._row(caption)
        return {"text": np.asarray(self._states[row]), "mask": np.asarray(self._masks[row])}

    def __reduce__(self) -> tuple:
        # A worker opens the files; pickling a mapped one would read it all.
        return TextCache, (self._folder,)

    def _row(self, caption: str) -> int:
        [(first, second)] = caption_keys([caption])
        place = int(np.searchsorted(self._keys[:, 0], first))
        while place < len(self._keys) and self._keys[place, 0] == first:
            if self._keys[place, 1] == second:
                return int(self._keys[place, 2])
            place += 1
        raise KeyError(caption)


def cache_texts(
    encoder: TextEncoder, about: Mapping[str, Any], captions: Sequence[str], length: int, folder: Path
) -> TextCache:
    """The cache of these captions at `length` positions in `folder`, computed there unless it is complete already.

    Interrupted work is done again, and a damaged cache, with a warning. A cache of other captions or of another encoder
    has another name. Every process calls this with the same captions, and all of them encode where one has work to do:
    first the first process, which writes the cache, then those that do not see its files.

    Args:
      about: what tells the encoder and its options from others: `hart_jax.data.precomputed.describe_texts`.

    Raises:
      UserError: the disk is full; nothing is left then. Or a state does not fit float16.
    """
    folder = folder / sha256(json.dumps([about, length], sort_keys=True), caption_keys(captions))[:16]
    cache = open_cache(folder, TextCache, "text embeddings")
    for first in (True, False):
        writes = cache is None and (jax.process_index() == 0) == first
        if np.any(multihost_utils.process_allgather(writes)):
            _encode_all(encoder, captions, length, folder if writes else None)
            multihost_utils.sync_global_devices("text embeddings")
        cache = cache or open_cache(folder, TextCache, "text embeddings")
    return TextCache(folder)


def _encode_all(encoder: TextEncoder, captions: Sequence[str], length: int, folder: Path | None) -> None:
    """Encodes the captions, and writes their cache where this process has a folder for it."""
    cut, starts = 0, range(0, len(captions), BATCH)
    with contextlib.ExitStack() as stack:
        new, write = stack.enter_context(new_cache(folder, len(captions))) if folder else (None, None)
        bar = tqdm(total=len(captions), desc="text embeddings", mininterval=5, disable=write is None)
        stack.enter_context(bar)
        for start in starts:
            batch = captions[start : start + BATCH]
            states, masks, cut_here = embed_captions(encoder, batch, length)
            if write is not None:
                write(states=states, masks=masks)
            cut += cut_here
            bar.update(len(batch))
        if new is not None:
            keys = caption_keys(captions)
            order = np.argsort(keys[:, 0], kind="stable")
            np.save(new / "keys.npy", np.column_stack([keys[order], order.astype(np.uint64)]))
    if folder is not None:
        print(f"text embeddings: {len(captions)} captions, {cut} cut to {length} positions", flush=True)
