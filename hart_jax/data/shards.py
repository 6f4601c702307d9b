"""ArrayRecord shards of a captioned image folder.

    python -m hart_jax.data.shards --source DIR --out DIR --workers 8     # DIR in the layout of `hart_jax.data.mjhq`
    python -m hart_jax.data.shards --verify DIR                           # compares every checksum

A shard folder holds

    train-00000-of-00012.array_record   group_size:1, so that any record is read alone
    train-00000-of-00012.captions.jsonl its captions, to be read without the images: `hart_jax.data.caption_column`
    SHA256SUMS                          as `sha256sum -c` reads it
    dataset.json                        format, number of records, categories, each file's name, records and bytes

A record is a msgpack map of `image` (the file's own bytes), `prompt`, `captions`, `category` and `id`, of `attributes`
where the source has some, and after `hart_jax.data.precompute` also of `tokens` and `texts`. dataset.json is written
last: a folder without it is unfinished, and the same command carries on with it. A record's label is the place of its
category among the sorted ones of dataset.json.
"""

import argparse
import functools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from hart_jax.checkpoints.class_names import DATASET_FILE, merged
from hart_jax.data.caption_column import CaptionColumn, caption_line, open_column
from hart_jax.data.check_images import aspect, checked, decode, pool_of
from hart_jax.data.mjhq import Example, read_folder
from hart_jax.data.shard_content import (
    check_unchanged,
    digest_of,
    digest_of_all,
    record_digest,
    record_of,
    stored_digests,
)
from hart_jax.data.shard_files import check_files, listed, record_count, whole_number
from hart_jax.data.staging import Shard, captions_file, open_records
from hart_jax.errors import UserError, run_cli
from hart_jax.io.buckets import local_copy, object_sizes
from hart_jax.io.files import atomic_file, read_json, remove_unfinished, write_json, write_text
from hart_jax.io.fingerprint import differences, sha256, sha256sum
from hart_jax.io.ownership import OWNER_FILE, owned
from hart_jax.io.paths import as_path, is_remote

FORMAT = 1
CHECKSUM_FILE = "SHA256SUMS"
UNFINISHED_FILE = "unfinished.json"

# What every record has.
_RECORD = {"image": bytes, "prompt": str, "captions": list, "category": str, "id": str}

Folders = str | Path | Sequence[str | Path]


def write_shards(
    source: str | Path, out: str | Path, *, records_per_shard: int = 1024, max_aspect: float = 0, workers: int = 0
) -> int:
    """Writes a folder of captioned images as shards; returns the number of records.

    Every image is decoded once before any shard is begun. A run that was interrupted is carried on with: shards whose
    checksum is right and which hold what the source holds now are kept, the others are written again.

    Args:
      source: folder in the layout of `hart_jax.data.mjhq`.
      out: folder for the shards.
      records_per_shard: images in each but the last.
      max_aspect: images whose longer side is more than this many times the shorter are left out; 0 keeps all.
      workers: processes that check and write, on which nothing else depends; 0 does so in this one.

    Raises:
      UserError: the source is not such a folder, an image does not decode (nothing is written then), or `out` holds
        something else, or complete shards of images or captions that have changed since; the message names them.
    """
    source, out = local_copy(source), as_path(out, "--out")
    if records_per_shard < 1:
        raise UserError(f"--records_per_shard {records_per_shard} must be at least 1")
    if max_aspect and max_aspect < 1:
        raise UserError(f"--max_aspect {max_aspect:g} must be at least 1, which keeps squares, or 0, which keeps all")
    if workers < 0:
        raise UserError(f"--workers {workers} must be 0 or more")
    with owned(out, "a run that writes shards"), pool_of(workers) as pool:
        return _write_shards(source, out, records_per_shard, max_aspect, pool)


def _write_shards(source: Path, out: Path, records_per_shard: int, max_aspect: float, pool: Executor) -> int:
    settings: dict[str, Any] = {"format": FORMAT, "records_per_shard": records_per_shard}
    sums = resume(out, settings)
    found = examples = read_folder(source)
    if max_aspect:
        aspects = checked(pool, aspect, found, "measuring")
        examples = [example for example, aspect in zip(found, aspects, strict=True) if aspect <= max_aspect]
        if not examples:
            raise UserError(f"--max_aspect {max_aspect:g} leaves none of the {len(found)} images of {source}")
    if sums is None:
        now = dict(zip(_ids(examples), checked(pool, digest_of, examples, "comparing"), strict=True))
        check_unchanged(out, stored_digests(open_shards(out)), now)
        return len(examples)

    groups = [examples[start : start + records_per_shard] for start in range(0, len(examples), records_per_shard)]
    stem, total = source.resolve().name, len(groups)
    paths = [out / f"{stem}-{number:05d}-of-{total:05d}.array_record" for number in range(total)]
    digests: dict[str, str] = {}
    unwritten = []
    for path, group in zip(paths, groups, strict=True):
        if is_finished(path, sums):
            now = dict(zip(_ids(group), checked(pool, digest_of, group, f"comparing {path.name}"), strict=True))
            local = local_copy(path)
            stored = stored_digests([Shard(local, len(group), 0)]) if record_count(local) == len(group) else {}
            if list(now.items()) == list(stored.items()):
                digests |= now
                continue
        unwritten.append((path, group))
    new = [example for _, group in unwritten for example in group]
    digests |= zip(_ids(new), checked(pool, _inspect, new, "checking"), strict=True)

    settings |= {"count": len(examples), "source_sha256": digest_of_all(digests[name] for name in _ids(examples))}
    begin(out, settings)
    for name in sums.keys() - {path.name for path in paths}:
        # Of a source that had other images when it was begun.
        (out / name).unlink(missing_ok=True)
        captions_file(out / name).unlink(missing_ok=True)
    # One after the other unless asked otherwise: one disk.
    write_all = pool.map if isinstance(pool, ProcessPoolExecutor) else map
    work = [(path, group, [digests[name] for name in _ids(group)]) for path, group in unwritten]
    written = write_all(_write_shard, *zip(*work, strict=True)) if work else []
    progress = tqdm(written, total=total, initial=total - len(unwritten), unit="shard", desc="writing")
    for (path, _), digest in zip(unwritten, progress, strict=True):
        sums[path.name] = digest
        write_checksums(out, sums)
    categories = sorted({example.category for example in examples})
    about = {**settings, "left_out": len(found) - len(examples), "categories": categories}
    complete(out, about, sums, {path.name: len(group) for path, group in zip(paths, groups, strict=True)})
    return len(examples)


def open_shards(folder: str | Path) -> list[Shard]:
    """The shards of a finished folder, after checking that each is there with the right size and number of records.

    Raises:
      UserError: naming the folder or shard that is missing, unfinished, truncated or damaged.
    """
    folder = as_path(folder)
    path = folder / DATASET_FILE
    if not path.is_file():
        state = "is unfinished; run the same command again" if (folder / UNFINISHED_FILE).exists() else "has none"
        raise UserError(f"{folder} is not a shard folder: it needs {DATASET_FILE} and {state}")
    try:
        dataset = read_dataset(folder)
        if dataset["format"] != FORMAT:
            raise UserError(
                f"{path} has format {dataset['format']}, this version reads {FORMAT}; write the shards anew"
            )
        sums = _read_checksums(folder) if is_remote(folder) else {}
        shards = [listed(folder, sums, **item) for item in dataset["shards"]]
        total = whole_number(dataset["count"])
        for name, kind in (("precomputed", dict), ("categories", list)):
            if not isinstance(dataset.get(name, kind()), kind):
                raise TypeError(f"{name} is {dataset[name]!r}")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); write the shards anew") from error
    check_files(shards, object_sizes(folder) if is_remote(folder) else None)
    if sum(shard.count for shard in shards) != total:
        raise UserError(f"{path} says {total} records, its shards hold {sum(s.count for s in shards)}; write them anew")
    return shards


def verify(folder: str | Path) -> int:
    """Compares every shard's SHA-256 with the checksum file; returns the number of shards.

    Raises:
      UserError: naming the first shard that differs.
    """
    folder = as_path(folder)
    shards = open_shards(folder)
    checksums(folder)
    sums = _read_checksums(folder)
    for shard in tqdm(shards, unit="shard", desc="verifying"):
        for file in (shard.path, shard.captions):
            if file is not None and sums.get(file.name) != sha256sum(local_copy(file)):
                raise UserError(f"shard {file} does not match {CHECKSUM_FILE}; copy or write it again")
    return len(shards)


def checksums(folder: str | Path) -> bytes:
    """The checksum file of a shard folder, by which its content is known.

    Raises:
      UserError: it is missing.
    """
    path = as_path(folder) / CHECKSUM_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"shard folder {folder} needs {CHECKSUM_FILE} ({error.strerror}); copy it, too") from error


def as_paths(folders: Folders) -> list[Path]:
    """One or several folders as a list."""
    return [as_path(folder) for folder in ([folders] if isinstance(folders, str | os.PathLike) else folders)]


class RecordSource:
    """Random access to the records of one or several shard folders, one after the other.

    `source[i]` is a dict with `image` (bytes), `prompt`, `captions` (list), `category`, `id` and `label`, the place of
    its category in `categories`. Folders written before there were labels give none.

    Attributes:
      folder_starts: where each folder's records start, and where they all end.
      categories: of all folders, sorted; empty where one has no labels.
      precomputed: what each folder says of the fields that `hart_jax.data.precompute` added.
      captions: what the records say, read without the images. Of shards without captions files all records are read
        once, when this is first asked for.

    Raises:
      UserError: on opening, as `open_shards`; on reading, naming a shard whose record is damaged.
    """

    def __init__(self, folders: Folders):
        found = [open_shards(folder) for folder in as_paths(folders)]
        self.shards = [shard for shards in found for shard in shards]
        self.folder_starts = [0, *accumulate(sum(shard.count for shard in shards) for shards in found)]
        self._records = open_records(self.shards)
        self._starts = [0, *accumulate(shard.count for shard in self.shards)]
        about = [read_dataset(folder) for folder in as_paths(folders)]
        self.precomputed = [dataset.get("precomputed", {}) for dataset in about]
        self.categories = merged([dataset.get("categories", []) for dataset in about])
        self._labels = {category: label for label, category in enumerate(self.categories)}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        index = range(len(self))[int(index)]
        try:
            record = msgpack.unpackb(self._records[index])
            for name, kind in _RECORD.items():
                if not isinstance(record[name], kind):
                    raise ValueError(f"a record's {name} is no {kind.__name__}")
            return {**record, "label": self._labels[record["category"]]} if self._labels else record
        except (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            shard = self.shards[bisect_right(self._starts, index) - 1]
            reason = str(error).split(";")[0][:200]
            raise UserError(f"shard {shard.path} is damaged ({reason}); copy or write it again") from error

    @functools.cached_property
    def captions(self) -> CaptionColumn:
        return open_column(self.shards, self._records)

    def label_of(self, category: str) -> dict[str, int]:
        """The `label` of a record of this category; nothing where the folders give no labels."""
        if self._labels and category not in self._labels:
            raise UserError(f"the shards have no category {category!r}; copy or write them again")
        return {"label": self._labels[category]} if self._labels else {}

    def name_of(self, index: int) -> str:
        """What to call a record in messages: its id where that can be read."""
        try:
            return repr(self[index]["id"])
        except UserError:
            return f"number {index} of the shards"


def resume(out: Path, settings: dict) -> dict[str, str] | None:
    """Checksums of the shards already written to `out`; None if it is complete.

    Raises:
      UserError: it holds something else, or what was begun with other settings.
    """
    if not out.exists() or (out.is_dir() and all(path.name == OWNER_FILE for path in out.iterdir())):
        return {}
    for name in (DATASET_FILE, UNFINISHED_FILE):
        if (out / name).is_file():
            known = read_json(local_copy(out / name))
            if changed := differences({key: known.get(key) for key in settings}, settings):
                raise UserError(
                    f"--out {out} holds shards of other images or settings ({', '.join(changed)}); use another folder"
                )
            if name == DATASET_FILE:
                open_shards(out)
                return None
            return _read_checksums(out)
    raise UserError(f"--out {out} is not empty and not a shard folder; use another folder")


def begin(out: Path, settings: dict) -> None:
    """Makes `out` an unfinished shard folder, which `resume` knows by these settings."""
    write_json(out / UNFINISHED_FILE, settings, indent=1)


def is_finished(path: Path, sums: dict[str, str]) -> bool:
    """Whether a shard is there as its checksum says."""
    if is_remote(path):
        # Of what is uploaded, the checksum is written afterwards.
        return path.name in sums and path.is_file()
    return path.is_file() and captions_file(path).is_file() and sums.get(path.name) == sha256sum(path)


def write_checksums(out: Path, sums: dict[str, str]) -> None:
    write_text(out / CHECKSUM_FILE, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def complete(out: Path, about: dict, sums: dict[str, str], counts: dict[str, int]) -> None:
    """Completes a shard folder that holds the files `counts`, of so many records each."""
    listing, all_sums, captions = [], dict[str, str](), {name: captions_file(out / name) for name in counts}
    files = [*(out / name for name in counts), *captions.values()]
    sizes = object_sizes(out) if is_remote(out) else {file.name: file.stat().st_size for file in files}
    for name, count in counts.items():
        beside = captions[name].name
        listing.append({"file": name, "count": count, "bytes": sizes[name], "captions_bytes": sizes[beside]})
        all_sums |= {name: sums[name], beside: sha256(captions[name].read_bytes())}
    write_checksums(out, all_sums)
    write_json(out / DATASET_FILE, {**about, "shards": listing}, indent=1)
    (out / UNFINISHED_FILE).unlink()


def _inspect(example: Example) -> str:
    """The digest of an example whose image decodes."""
    record = record_of(example)
    decode(example, record["image"])
    return record_digest(record)


def _write_shard(path: Path, examples: list[Example], digests: list[str]) -> str:
    """Writes one shard and returns its checksum.

    Raises:
      UserError: an example is no longer what its digest was made of.
    """

    def packed() -> Iterator[bytes]:
        for example, digest in zip(examples, digests, strict=True):
            record = record_of(example)
            if record_digest(record) != digest:
                raise UserError(f"image {example.path} has changed since it was checked; run the same command again")
            yield msgpack.packb(record)

    return write_records(path, packed())


def _ids(examples: Iterable[Example]) -> list[str]:
    return [example.id for example in examples]


def write_records(path: Path, records: Iterable[bytes]) -> str:
    """Writes a shard and its captions, each whole or not at all, and returns the shard's checksum."""
    captions = captions_file(path)
    if not is_remote(path):
        remove_unfinished(path.parent, (path.name, captions.name))
    try:
        # A shard that has its name has its captions.
        with atomic_file(path) as shard, atomic_file(captions) as texts, texts.open("wb") as lines:
            writer = ArrayRecordWriter(str(shard), "group_size:1")
            for record in records:
                writer.write(record)
                lines.write(caption_line(record))
            writer.close()
            return sha256sum(shard)
    except (RuntimeError, OSError) as error:
        problem = str(error).split(";")[0][:200]
        raise UserError(f"shard {path} cannot be written ({problem}); make room for it") from error


def read_dataset(folder: Path) -> dict[str, Any]:
    """What a finished shard folder says of itself."""
    return read_json(local_copy(folder / DATASET_FILE))


def _read_checksums(folder: Path) -> dict[str, str]:
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return {}
    lines = (line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if "  " in line)
    return {name: digest for digest, name in lines}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a captioned image folder as ArrayRecord shards, or verify them."
    )
    parser.add_argument("--source", help="folder with meta_data.json and <category>/<id>.png, or these in a zip")
    parser.add_argument("--out", help="folder for the shards; new, empty or unfinished")
    parser.add_argument("--records_per_shard", type=int, default=1024)
    parser.add_argument("--max_aspect", type=float, default=0, help="leave out longer images; 0 keeps all")
    parser.add_argument("--workers", type=int, default=0, help="processes that check and write; 0: this one alone")
    parser.add_argument("--verify", metavar="DIR", help="only compare the checksums of this shard folder")
    args = parser.parse_args()
    if args.verify is not None:
        print(f"{verify(args.verify)} shards of {args.verify} match {CHECKSUM_FILE}")
    elif args.source is None or args.out is None:
        raise UserError("give --source and --out to write shards, or --verify to check them")
    else:
        count = write_shards(
            args.source,
            args.out,
            records_per_shard=args.records_per_shard,
            max_aspect=args.max_aspect,
            workers=args.workers,
        )
        left_out = read_dataset(as_path(args.out)).get("left_out", 0)
        print(f"{count} records in {len(open_shards(args.out))} shards in {args.out}; {left_out} images left out")


if __name__ == "__main__":
    run_cli(main)
