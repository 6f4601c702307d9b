"""Sizes of the tiles, by implementation and device: a table, `blocks.json`, which `tune` fills.

A tile is (queries, keys). All passes share one layout of the queries, whose rows are filled up to a common multiple of
their tiles.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TABLE_FILE = Path(__file__).with_name("blocks.json")
Tile = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tiles (queries, keys) of the forward pass, of dQ, and of dK and dV."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def queries(self) -> int:
        """What rows of queries are filled up to a multiple of."""
        return math.lcm(self.forward[0], self.dq[0], self.dkv[0])

    @property
    def keys(self) -> int:
        return math.lcm(self.forward[1], self.dq[1], self.dkv[1])


@dataclasses.dataclass(frozen=True)
class Row:
    """Of the table: the tiles on devices whose kind contains `device`, for at most so many queries (0: any number),
    each of at most so many bytes (width times those of the type)."""

    implementation: str
    device: str
    bytes: int
    queries: int
    blocks: Blocks

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.implementation, self.device, self.bytes, self.queries


@functools.cache
def read_table() -> tuple[Row, ...]:
    rows = json.loads(TABLE_FILE.read_text())
    return tuple(Row(**{**row, "blocks": Blocks(*map(tuple, row["blocks"]))}) for row in rows)


def write_table(rows: Iterable[Row]) -> None:
    """One line a row, those of named devices, few queries and few bytes first, as the first that applies counts."""

    def line(row: Row) -> str:
        values: dict[str, Any] = dataclasses.asdict(row)
        return json.dumps({**values, "blocks": list(values["blocks"].values())})

    ordered = sorted(
        rows, key=lambda row: (row.implementation, not row.device, row.bytes, not row.queries, row.queries)
    )
    TABLE_FILE.write_text("[\n" + ",\n".join(f"  {line(row)}" for row in ordered) + "\n]\n")
    read_table.cache_clear()


def blocks_for(implementation: str, device_kind: str, width_bytes: int, queries: int) -> Blocks:
    """The tiles of an implementation on a device (`jax.Device.device_kind`).

    Raises:
      NotImplementedError: the implementation has none for queries so wide.
    """
    for row in read_table():
        applies = row.implementation == implementation and row.device in device_kind
        if applies and width_bytes <= row.bytes and queries <= (row.queries or queries):
            return row.blocks
    raise NotImplementedError(
        f"{implementation}: has no heads whose queries are {width_bytes} bytes wide; use implementation='xla'"
    )
