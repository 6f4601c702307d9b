"""Tokens of all training images, computed once and kept on disk: the tokenizer then costs a training step nothing."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hart_jax.config import TokenizerConfig
from hart_jax.data.bad_records import BadRecords
from hart_jax.data.pipeline import PictureSource
from hart_jax.data.shards import Folders, as_paths, checksums
from hart_jax.errors import UserError
from hart_jax.images import from_uint8
from hart_jax.tokenizer.model import Tokenizer

BATCH = 64
COMPLETE_FILE = "complete.json"
# Fields of `Tokens` and the type each is kept in; a code's index fits 16 bits up to V = 65,536.
FIELDS = {"indices": np.uint16, "f_rest": np.float16, "ar_input": np.float16}


class TokenMaker:
    """Images (n, S, S, 3) uint8, n <= BATCH, -> the fields of their tokens, as `FIELDS` are kept, with n rows each."""

    def __init__(self, config: TokenizerConfig, params):
        tokenizer = Tokenizer(config)
        self._params = params
        self._encode = jax.jit(
            lambda params, image: tokenizer.apply({"params": params}, from_uint8(image), method="tokens")
        )

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        # A full batch each time, so that one compilation serves all.
        full = np.concatenate([images, np.zeros((BATCH - len(images), *images.shape[1:]), np.uint8)])
        tokens = jax.device_get(self._encode(self._params, full))
        values = {
            "indices": np.concatenate(tokens.indices, axis=1),
            "f_rest": tokens.f_rest_BPC,
            "ar_input": tokens.ar_input_BLC,
        }
        return {name: values[name][: len(images)].astype(dtype) for name, dtype in FIELDS.items()}


class TokenTable:
    """image number -> {"indices": (L,) int32, "f_rest": (P*P, C), "ar_input": (L-1, C) float16}.

    Raises:
      UserError: when asked for an image that did not decode.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._bad = frozenset(json.loads((folder / COMPLETE_FILE).read_text()).get("bad", ()))
        self._columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS}

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        if index in self._bad:
            raise UserError(f"image {index} of the shards did not decode when its tokens were computed")
        row = {name: np.asarray(column[index]) for name, column in self._columns.items()}
        return {**row, "indices": row["indices"].astype(np.int32)}

    def __reduce__(self) -> tuple:
        # A worker opens the files; pickling a mapped one would read it all.
        return TokenTable, (self._folder,)


def precompute_tokens(
    config: TokenizerConfig, params, shards: Folders, folder: Path, max_bad_records: int = 0
) -> TokenTable:
    """The table of shard folders' images under this tokenizer in `folder`, computed unless it is complete already.

    Images are not mirrored. Interrupted work is done again: `complete.json`, written last, marks a complete table. That
    of another tokenizer or of other shards has another name.

    Raises:
      UserError: naming some, if more than `max_bad_records` images do not decode; fewer are left out with a warning.
    """
    source = PictureSource(shards, config.image_size)
    known = [checksums(path).decode() for path in as_paths(shards)]
    digest = hashlib.sha256(json.dumps([config.to_dict(), *known]).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    folder = folder / digest.hexdigest()[:16]
    if not (folder / COMPLETE_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokens_of = TokenMaker(config, params)
        count, columns = len(source), {}
        bad = BadRecords(source.records.name_of, max_bad_records, "it gets no tokens")
        for start in tqdm(range(0, count, BATCH), desc="tokens", unit_scale=BATCH, mininterval=5):
            numbers = range(start, min(start + BATCH, count))
            images = np.zeros((len(numbers), config.image_size, config.image_size, 3), np.uint8)
            for row, number in enumerate(numbers):
                try:
                    images[row] = source[number]["image"]
                except UserError:
                    bad.add(number)
            for name, values in tokens_of(images).items():
                if name not in columns:
                    shape = (count, *values.shape[1:])
                    columns[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", values.dtype, shape)
                columns[name][start : numbers.stop] = values
        for column in columns.values():
            column.flush()
        (folder / COMPLETE_FILE).write_text(json.dumps({"images": count, "bad": bad.numbers}))
    return TokenTable(folder)
