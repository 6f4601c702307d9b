"""ArrayRecord shards of a captioned image folder.

    python -m hart_jax.data.shards --source DIR --out DIR      # DIR in the layout of `hart_jax.data.mjhq`
    python -m hart_jax.data.shards --verify DIR                # compares every checksum

A shard folder holds

    train-00000-of-00012.array_record   group_size:1, so that any record is read alone
    SHA256SUMS                          as `sha256sum -c` reads it
    dataset.json                        format, number of records, and each shard's name, records and bytes

A record is a msgpack map of `image` (the file's own bytes), `prompt`, `captions`, `category` and `id`. dataset.json is
written last: a folder without it is unfinished, and the same command carries on with it.
"""

import argparse
import hashlib
import io
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import msgpack
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tqdm import tqdm

from hart_jax.data.mjhq import Example, read_folder
from hart_jax.errors import UserError, run_cli

FORMAT = 1
DATASET_FILE = "dataset.json"
CHECKSUM_FILE = "SHA256SUMS"
UNFINISHED_FILE = "unfinished.json"


@dataclass(frozen=True)
class Shard:
    """One file of a shard folder: its path, number of records and size in bytes."""

    path: Path
    count: int
    bytes: int


def write_shards(source: str | Path, out: str | Path, *, records_per_shard: int = 1024) -> int:
    """Writes a folder of captioned images as shards; returns the number of records.

    Every image is decoded once before its shard is begun. A run that was interrupted is carried on with: shards whose
    checksum is right are kept.

    Raises:
      UserError: the source is not such a folder, an image does not decode (nothing is written then), or `out` holds
        something else.
    """
    source, out = Path(source), Path(out)
    if records_per_shard < 1:
        raise UserError(f"--records_per_shard {records_per_shard} must be at least 1")
    examples = read_folder(source)
    settings = {
        "format": FORMAT,
        "count": len(examples),
        "records_per_shard": records_per_shard,
        "source_sha256": _fingerprint(examples),
    }
    sums = _resume(out, settings)
    if sums is None:
        return len(examples)

    groups = [examples[start : start + records_per_shard] for start in range(0, len(examples), records_per_shard)]
    stem = source.resolve().name
    paths = [out / f"{stem}-{number:05d}-of-{len(groups):05d}.array_record" for number in range(len(groups))]
    finished = [path.is_file() and sums.get(path.name) == _sha256(path) for path in paths]
    unwritten = [group for group, done in zip(groups, finished, strict=True) if not done]
    _check_images([example for group in unwritten for example in group])

    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / UNFINISHED_FILE, json.dumps(settings, indent=1) + "\n")
    for path, group, done in tqdm(list(zip(paths, groups, finished, strict=True)), unit="shard", desc="writing"):
        if not done:
            sums[path.name] = _write_shard(path, group)
            _write_text(out / CHECKSUM_FILE, _checksum_lines(sums))
    _write_text(out / CHECKSUM_FILE, _checksum_lines({path.name: sums[path.name] for path in paths}))
    listing = [
        {"file": path.name, "count": len(group), "bytes": path.stat().st_size}
        for path, group in zip(paths, groups, strict=True)
    ]
    _write_text(out / DATASET_FILE, json.dumps({**settings, "shards": listing}, indent=1) + "\n")
    (out / UNFINISHED_FILE).unlink()
    return len(examples)


def open_shards(folder: str | Path) -> list[Shard]:
    """The shards of a finished folder, after checking that each is there with the right size and number of records.

    Raises:
      UserError: naming the folder or shard that is missing, unfinished, truncated or damaged.
    """
    folder = Path(folder)
    path = folder / DATASET_FILE
    if not path.is_file():
        state = "is unfinished; run the same command again" if (folder / UNFINISHED_FILE).exists() else "has none"
        raise UserError(f"{folder} is not a shard folder: it needs {DATASET_FILE} and {state}")
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
        if dataset["format"] != FORMAT:
            raise UserError(
                f"{path} has format {dataset['format']}, this version reads {FORMAT}; write the shards anew"
            )
        shards = [Shard(folder / item["file"], item["count"], item["bytes"]) for item in dataset["shards"]]
        total = dataset["count"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); write the shards anew") from error
    for shard in shards:
        _check_shard(shard)
    if sum(shard.count for shard in shards) != total:
        raise UserError(f"{path} says {total} records, its shards hold {sum(s.count for s in shards)}; write them anew")
    return shards


def verify(folder: str | Path) -> int:
    """Compares every shard's SHA-256 with the checksum file; returns the number of shards.

    Raises:
      UserError: naming the first shard that differs.
    """
    folder = Path(folder)
    shards = open_shards(folder)
    sums = _read_checksums(folder)
    for shard in tqdm(shards, unit="shard", desc="verifying"):
        if sums.get(shard.path.name) != _sha256(shard.path):
            raise UserError(f"shard {shard.path} does not match {CHECKSUM_FILE}; copy or write it again")
    return len(shards)


class RecordSource:
    """Random access to the records of a shard folder, for `grain.MapDataset.source`.

    `source[i]` is a dict with `image` (bytes), `prompt`, `captions` (list), `category` and `id`.

    Raises:
      UserError: on opening, as `open_shards`; on reading, naming a shard whose record is damaged.
    """

    def __init__(self, folder: str | Path):
        self.shards = open_shards(folder)
        self._records = grain.sources.ArrayRecordDataSource([str(shard.path) for shard in self.shards])
        self._starts = [0, *accumulate(shard.count for shard in self.shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = range(len(self))[int(index)]
        try:
            return msgpack.unpackb(self._records[index])
        except (RuntimeError, ValueError, msgpack.UnpackException) as error:
            shard = self.shards[bisect_right(self._starts, index) - 1]
            reason = str(error).split(";")[0][:200]
            raise UserError(f"shard {shard.path} is damaged ({reason}); copy or write it again") from error


def _resume(out: Path, settings: dict) -> dict[str, str] | None:
    """Checksums of the shards already written to `out`; None if it is complete."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    for name in (DATASET_FILE, UNFINISHED_FILE):
        if (out / name).is_file():
            known = json.loads((out / name).read_text(encoding="utf-8"))
            if {key: known.get(key) for key in settings} != settings:
                raise UserError(f"--out {out} holds shards of other images or settings; use another folder")
            if name == DATASET_FILE:
                open_shards(out)
                return None
            return _read_checksums(out)
    raise UserError(f"--out {out} is not empty and not a shard folder; use another folder")


def _fingerprint(examples: list[Example]) -> str:
    """Digest of all ids and captions: whether an unfinished folder belongs to this source."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.category, example.captions, example.path.name]).encode())
    return digest.hexdigest()


def _check_images(examples: list[Example]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        problems: Iterable[str] = pool.map(_decoding_problem, examples)
        for example, problem in tqdm(
            zip(examples, problems, strict=True),
            total=len(examples),
            unit="image",
            desc="checking",
            disable=not examples,
        ):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"image {example.path} does not decode ({problem}); mend it or remove its entry")


def _decoding_problem(example: Example) -> str:
    try:
        with Image.open(io.BytesIO(example.path.read_bytes())) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error).replace(f"{example.path}", "file").splitlines()[0]
    return ""


def _write_shard(path: Path, examples: list[Example]) -> str:
    """Writes one shard under a temporary name and returns its checksum once it has its own."""
    partial = path.with_name(path.name + ".partial")
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for example in examples:
        record = {
            "image": example.path.read_bytes(),
            "prompt": example.prompt,
            "captions": list(example.captions),
            "category": example.category,
            "id": example.id,
        }
        writer.write(msgpack.packb(record))
    writer.close()
    os.replace(partial, path)
    return _sha256(path)


def _check_shard(shard: Shard) -> None:
    if not shard.path.is_file():
        raise UserError(f"shard {shard.path} is missing; copy or write it again")
    size = shard.path.stat().st_size
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "damaged"
        raise UserError(f"shard {shard.path} is {kind}: {size} bytes instead of {shard.bytes}; copy or write it again")
    reader = ArrayRecordReader(str(shard.path))
    try:
        count = reader.num_records() if reader.ok() else math.nan
    finally:
        # Closing a reader of a damaged file raises what the check reports below.
        if reader.ok():
            reader.close()
    if count != shard.count:
        found = "an unreadable index" if math.isnan(count) else f"{count} records"
        raise UserError(f"shard {shard.path} is damaged: {found} instead of {shard.count}; copy or write it again")


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if "  " in line)
    return {name: digest for digest, name in lines}


def _checksum_lines(sums: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a captioned image folder as ArrayRecord shards, or verify them."
    )
    parser.add_argument("--source", type=Path, help="folder with meta_data.json and <category>/<id>.png")
    parser.add_argument("--out", type=Path, help="folder for the shards; new, empty or unfinished")
    parser.add_argument("--records_per_shard", type=int, default=1024)
    parser.add_argument("--verify", type=Path, metavar="DIR", help="only compare the checksums of this shard folder")
    args = parser.parse_args()
    if args.verify is not None:
        print(f"{verify(args.verify)} shards of {args.verify} match {CHECKSUM_FILE}")
    elif args.source is None or args.out is None:
        raise UserError("give --source and --out to write shards, or --verify to check them")
    else:
        count = write_shards(args.source, args.out, records_per_shard=args.records_per_shard)
        print(f"{count} records in {len(open_shards(args.out))} shards in {args.out}")


if __name__ == "__main__":
    run_cli(main)
