"""What was measured on which device: `measured.json`, which "auto" reads and `benchmarks/attention.py --write` fills.

A row is one implementation at one of HART's shapes on one kind of device. Without rows of a device "auto" takes there
what JAX or its maker have. Another implementation takes its place as soon as a row says that it was right and faster.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

from pallas_kernels.attention.shapes import SHAPES

TABLE_FILE = Path(__file__).with_name("measured.json")
# Of max|a - b| / max|b| of the output and of each gradient, in half precision.
RIGHT = 2e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """`device` is `jax.Device.device_kind`; `shape` a name in `shapes.SHAPES`; `error` the largest of output and
    gradients, a share of the largest value, against `reference`; times are medians, in ms, of a forward pass and
    of forward and backward together; `jax` and `date` (ISO) say with what and when."""

    device: str
    shape: str
    implementation: str
    dtype: str
    width: int
    error: float
    forward_ms: float
    both_ms: float
    jax: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.device, self.shape, self.implementation, self.dtype, self.width


@functools.cache
def read_table() -> tuple[Row, ...]:
    return tuple(Row(**row) for row in json.loads(TABLE_FILE.read_text()))


def write_rows(rows: Iterable[Row]) -> None:
    """Puts rows into the table, in place of older ones of the same device, shape, implementation, type and width."""
    found = {row.key: row for row in (*read_table(), *rows)}
    lines = [f"  {json.dumps(dataclasses.asdict(row))}" for _, row in sorted(found.items())]
    TABLE_FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    read_table.cache_clear()


def fastest(usual: str, others: Iterable[str], device: str, queries: int, dtype: str, width: int) -> str:
    """The implementation to take: `usual`, unless one of `others` was right and faster at the nearest measured shape.

    Times are those with gradients. Only shapes at which `usual` was measured on the same kind of device, with the same
    type and width, count.
    """
    rows = [row for row in read_table() if (row.device, row.dtype, row.width) == (device, dtype, width)]
    shapes = {row.shape for row in rows if row.implementation == usual}
    if not shapes:
        return usual
    nearest = min(sorted(shapes), key=lambda name: abs(SHAPES[name].queries - queries))
    times = {row.implementation: row.both_ms for row in rows if row.shape == nearest and row.error <= RIGHT}
    # A row of the usual one that is wrong is beaten by any that is right.
    limit = times.get(usual, float("inf"))
    faster = {name: times[name] for name in others if times.get(name, limit) < limit}
    return min(faster, key=faster.__getitem__, default=usual)
