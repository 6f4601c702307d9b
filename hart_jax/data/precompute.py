"""Shards with tokens and text embeddings in their records, for training that runs neither tokenizer nor text encoder.

    python -m hart_jax.data.precompute --shards DIR --out DIR --tokenizer DIR --text_encoder DIR --context_tokens 300 \\
        --system_prompt FILE --text_dtype bfloat16

copies a shard folder and adds to each record

    tokens    of its image as it is, not mirrored: `indices` uint16 (of more than 65,536 codes uint32), `f_rest` and
              `ar_input` float16; None for an image that does not decode. With `--buckets=1:1,2:3,3:2` of an image
              of its bucket's size, as `data.buckets` has it
    texts     of each of its captions: `text` float16 and `mask` int32

Training with `precompute_tokens` and `precompute_text` takes them from there; with another tokenizer or text encoder it
stops. The same command carries on where it was interrupted. Records stay where they are, so that the order of training
does not change; a damaged one stays damaged.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from tqdm import tqdm

from hart_jax.config import TokenizerConfig
from hart_jax.config.buckets import bucket_shapes
from hart_jax.config.sizes import at_shape
from hart_jax.data import text_cache, token_cache
from hart_jax.data.aspect_buckets import nearest_shape
from hart_jax.data.bad_records import BadRecords
from hart_jax.data.image_files import cropped_image, known_size
from hart_jax.data.precomputed import TEXTS, TOKENS, describe_texts, describe_tokens, pack
from hart_jax.data.record_sizes import UNKNOWN
from hart_jax.data.shards import (
    RecordSource,
    begin,
    checksums,
    complete,
    is_finished,
    read_dataset,
    resume,
    write_checksums,
    write_records,
)
from hart_jax.errors import UserError, run_cli
from hart_jax.io.fingerprint import sha256
from hart_jax.io.ownership import owned
from hart_jax.io.paths import as_path
from hart_jax.parallel.mesh import data_parallel_layout
from hart_jax.text.encoder import load_text_encoder, text_options

# No msgpack value begins so: what stands for a record that could not be read.
_DAMAGED = b"\xc1"


class AddTokens:
    """Adds `tokens` to records, of images in `buckets` (ratios; without: all of the tokenizer's size); `about` is what
    the shards say of them."""

    field = TOKENS

    def __init__(self, config: TokenizerConfig, params: Any, buckets: Sequence[str] = ()):
        self.about = describe_tokens(config, params, buckets)
        self._shapes = bucket_shapes(buckets, config) or (config.image_shape,)
        configs = [at_shape(config, shape, config.downsampling) for shape in self._shapes]
        self._tokens_of = [token_cache.TokenMaker(each, params) for each in configs]
        self.batches = len(configs)

    def __call__(self, records: list[dict[str, Any]]) -> list[int]:
        """Returns which images do not decode."""
        sizes = [(known_size(record["image"]) or UNKNOWN)[::-1] for record in records]
        bucket_of = nearest_shape(np.array(sizes), self._shapes)
        bad = []
        for bucket, (shape, tokens_of) in enumerate(zip(self._shapes, self._tokens_of, strict=True)):
            there = np.flatnonzero(bucket_of == bucket).tolist()
            for start in range(0, len(there), token_cache.BATCH):
                chosen = there[start : start + token_cache.BATCH]
                images = np.zeros((len(chosen), *shape, 3), np.uint8)
                undecoded = []
                for row, number in enumerate(chosen):
                    try:
                        images[row] = cropped_image(records[number]["image"], shape)
                    except UserError:
                        undecoded.append(number)
                rows = _rows(tokens_of(images))
                for row, number in enumerate(chosen):
                    records[number][TOKENS] = None if number in undecoded else pack(rows[row])
                bad += undecoded
        return sorted(bad)


class AddTexts:
    """Adds `texts` to records; `about` is what the shards say of them."""

    field, batches = TEXTS, 1

    def __init__(
        self, encoder_folder: str | Path, positions: int, system_prompt: str | Path | None = None, dtype: str = "auto"
    ):
        options = text_options(encoder_folder, system_prompt, dtype)
        encoder = load_text_encoder(encoder_folder, **options, layout=data_parallel_layout())
        self._encoder, self._positions = encoder, positions
        self.about = describe_texts(encoder_folder, positions, options)

    def __call__(self, records: list[dict[str, Any]]) -> list[int]:
        captions = [caption for record in records for caption in record["captions"]]
        packed: list[dict[str, Any]] = []
        for start in range(0, len(captions), text_cache.BATCH):
            batch = captions[start : start + text_cache.BATCH]
            states, masks, _ = text_cache.embed_captions(self._encoder, batch, self._positions)
            packed += map(pack, _rows({"text": states, "mask": masks}))
        for record in records:
            count = len(record["captions"])
            record[TEXTS], packed = packed[:count], packed[count:]
        return []


def precompute(
    shards: str | Path, out: str | Path, fields: list[AddTokens | AddTexts], max_bad_records: int = 0
) -> int:
    """Writes `out`, or what is missing of it; returns the number of records.

    Raises:
      UserError: `shards` is no shard folder, `out` holds something else, or more than `max_bad_records` records do not
        decode; fewer are named on stderr.
    """
    shards, out = as_path(shards, "--shards"), as_path(out, "--out")
    source, about = RecordSource(shards), read_dataset(shards)
    del about["shards"]
    about |= {
        "precomputed": {**source.precomputed[0], **{field.field: field.about for field in fields}},
        "shards_sha256": sha256(checksums(shards)),
    }
    with owned(out, "a run that adds to shards"):
        return _precompute(source, out, fields, about, max_bad_records)


def _precompute(
    source: RecordSource, out: Path, fields: list[AddTokens | AddTexts], about: dict[str, Any], max_bad_records: int
) -> int:
    settings = {name: about[name] for name in ("format", "count", "shards_sha256", "precomputed")}
    sums = resume(out, settings)
    if sums is None:
        return len(source)
    begin(out, settings)
    bad = BadRecords(source.name_of, max_bad_records, "it gets no tokens")
    start = 0
    with tqdm(total=len(source), unit="image", mininterval=5) as progress:
        for shard in source.shards:
            path, numbers = out / shard.path.name, range(start, start + shard.count)
            start += shard.count
            if is_finished(path, sums):
                progress.update(shard.count)
                continue
            sums[path.name] = write_records(path, _with_fields(source, numbers, fields, bad, progress))
            write_checksums(out, sums)
    complete(out, about, sums, {shard.path.name: shard.count for shard in source.shards})
    return len(source)


def _with_fields(
    source: RecordSource, numbers: range, fields: list[AddTokens | AddTexts], bad: BadRecords, progress: tqdm
) -> Iterator[bytes]:
    # So many that each bucket has about a batch.
    at_once = token_cache.BATCH * max(field.batches for field in fields)
    for start in range(0, len(numbers), at_once):
        chunk = numbers[start : start + at_once]
        records = {}
        for number in chunk:
            try:
                records[number] = {name: value for name, value in source[number].items() if name != "label"}
            except UserError:
                bad.add(number)
        readable = list(records)
        for add in fields:
            if readable:
                for row in add(list(records.values())):
                    bad.add(readable[row])
        for number in chunk:
            yield msgpack.packb(records[number]) if number in records else _DAMAGED
        progress.update(len(chunk))


def _rows(columns: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    count = len(next(iter(columns.values())))
    return [{name: column[row] for name, column in columns.items()} for row in range(count)]


def main() -> None:
    from hart_jax.checkpoints.workdir import find_tokenizer

    parser = argparse.ArgumentParser(description="Adds tokens and text embeddings to the records of shards.")
    parser.add_argument("--shards", required=True, help="folder of hart_jax.data.shards")
    parser.add_argument("--out", required=True, help="folder for the new shards; new, empty or unfinished")
    parser.add_argument("--tokenizer", help="workdir or model folder of a tokenizer, for tokens")
    parser.add_argument("--buckets", default="", help="ratios as data.buckets has them, as 1:1,2:3,3:2")
    parser.add_argument("--text_encoder", help="folder of a text encoder, for text embeddings")
    parser.add_argument(
        "--context_tokens", type=int, help="positions of the text embeddings, as the transformer has them"
    )
    parser.add_argument("--system_prompt", help="file of the text encoder's system prompt")
    parser.add_argument(
        "--text_dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="the text encoder computes in it, as training will; auto: float32 on CPUs, bfloat16 elsewhere",
    )
    parser.add_argument("--max_bad_records", type=int, default=0, help="so many images may not decode")
    args = parser.parse_args()
    if not (args.tokenizer or args.text_encoder):
        raise UserError("give --tokenizer, --text_encoder, or both: there is nothing to add otherwise")
    if args.text_encoder and not (args.context_tokens and args.context_tokens > 0):
        raise UserError("--text_encoder needs --context_tokens, at least 1: transformer.context_tokens of the training")
    if args.buckets and not args.tokenizer:
        raise UserError("--buckets are of tokens: give --tokenizer, too")
    fields: list[AddTokens | AddTexts] = []
    if args.tokenizer:
        buckets = tuple(filter(None, args.buckets.split(",")))
        config, params = find_tokenizer(args.tokenizer)
        bucket_shapes(buckets, config, "--buckets")
        fields.append(AddTokens(config, params, buckets))
    if args.text_encoder:
        fields.append(AddTexts(args.text_encoder, args.context_tokens, args.system_prompt, args.text_dtype))
    count = precompute(args.shards, args.out, fields, args.max_bad_records)
    print(f"{count} records with {' and '.join(field.field for field in fields)} in {args.out}")


if __name__ == "__main__":
    run_cli(main)
