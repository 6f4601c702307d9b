"""What shards hold, as digests: whether their source has changed since they were written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grain
import msgpack

from hart_jax.errors import UserError

# So many records are named in a message.
_NAMED = 5


def record_digest(record: Mapping[str, Any]) -> str:
    """Of a record's image, texts, category and id, whatever order its attributes have."""
    known = [record[name] for name in ("id", "category", "prompt", "captions")]
    known += [sorted(record.get("attributes", {}).items()), hashlib.sha256(record["image"]).hexdigest()]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def digest_of_all(digests: Iterable[str]) -> str:
    """Of records in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def stored_digests(*shards: Path) -> dict[str, str]:
    """id -> digest of each record of some shards, in order."""
    records = grain.sources.ArrayRecordDataSource([str(path) for path in shards])
    unpacked = (msgpack.unpackb(records[index]) for index in range(len(records)))
    return {record["id"]: record_digest(record) for record in unpacked}


def check_unchanged(out: Path, stored: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Compares complete shards with their source, both id -> digest.

    Raises:
      UserError: naming images that differ, are new, or are gone.
    """
    parts = {
        "changed": [name for name in now if stored.get(name, now[name]) != now[name]],
        "are new": [name for name in now if name not in stored],
        "are gone": [name for name in stored if name not in now],
    }
    if any(parts.values()):
        told = "; ".join(f"{verb}: {_some(names)}" for verb, names in parts.items() if names)
        raise UserError(
            f"--out {out} holds shards of other images or captions than --source has now ({told}); "
            "use another folder, or remove this one to write it anew"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more
