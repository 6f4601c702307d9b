"""What shards hold, as digests: whether their source has changed since they were written."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from hart_jax.data.mjhq import Example
from hart_jax.data.staging import Shard, open_records
from hart_jax.errors import UserError
from hart_jax.io.fingerprint import json_digest, sha256

# So many records are named in a message.
_NAMED = 5


def record_of(example: Example) -> dict[str, Any]:
    """What a shard holds of an example: its image file's bytes, its texts, and what it is called."""
    return {
        "image": example.read(),
        "prompt": example.prompt,
        "captions": list(example.captions),
        "category": example.category,
        "id": example.id,
        **({"attributes": dict(example.attributes)} if example.attributes else {}),
    }


def digest_of(example: Example) -> str:
    """The digest of the record that it would have."""
    return record_digest(record_of(example))


def record_digest(record: Mapping[str, Any]) -> str:
    """Of a record's image, texts, category and id, whatever order its attributes have."""
    known = [record[name] for name in ("id", "category", "prompt", "captions")]
    known += [sorted(record.get("attributes", {}).items()), sha256(record["image"])]
    return json_digest(known)


def digest_of_all(digests: Iterable[str]) -> str:
    """Of records in their order."""
    return sha256("".join(digests))


def stored_digests(shards: Sequence[Shard]) -> dict[str, str]:
    """id -> digest of each record of some shards, in order.

    Raises:
      UserError: a record is damaged.
    """
    records = open_records(shards)
    try:
        unpacked = (msgpack.unpackb(records[index]) for index in range(sum(shard.count for shard in shards)))
        return {record["id"]: record_digest(record) for record in unpacked}
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        folder = shards[0].path.parent
        raise UserError(f"a shard of {folder} is damaged ({str(error)[:200]}); write the shards anew") from error


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
