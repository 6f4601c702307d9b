"""Collectives in the text of a compiled program: which devices take part, and what each of them sends."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """`kind` as XLA names it, the mesh's `axes` over which it works (joined by "+"), whether it takes the `slow` links
    between slices or hosts, and whether the program's order lets other work run meanwhile (`overlaps`)."""

    kind: str
    axes: str
    slow: bool = False
    overlaps: bool = False

    def __str__(self) -> str:
        return f"{self.kind} over {self.axes}"


def collective_of(line: str, kind: str, size: float, mesh: Mapping[str, int], island: int) -> tuple[Collective, float]:
    """Which one this line is, and the bytes that each device sends in a ring.

    `size` are bytes of its result on one device; `island` is how many devices, in the mesh's order, have fast links to
    each other (0: all).
    """
    group = _group(line, kind)
    places = np.array(np.unravel_index(group, tuple(mesh.values()))) if group else np.zeros((len(mesh), 1))
    axes = [axis for axis, along in zip(mesh, places, strict=True) if len(set(along)) > 1]
    islands = {device // island for device in group} if island else {0}
    wire = float(size) if kind == "collective-permute" and axes else _wire(kind, size, len(group))
    return Collective(kind, "+".join(axes) or "all", len(islands) > 1), wire


def transfer_of(line: str, size: float, mesh: Mapping[str, int], island: int) -> tuple[Collective, float] | None:
    """A `send` of `size` bytes that is a part of a collective between TPU slices, of one device in each; else None."""
    if (found := _TRANSFER.search(line)) is None:
        return None
    kind = found[1].lower().replace("_", "-")
    slices = math.prod(mesh.values()) // island if island else 1
    # An all-gather sends what it has, the others what is to be shared out.
    wire = size * (slices - 1) if kind == "all-gather" else _wire(kind, size, slices)
    return Collective(kind, next(iter(mesh)), slow=True), wire


def rendezvous(line: str) -> str:
    """Which `send` and `recv` belong together."""
    found = _RENDEZVOUS.search(line)
    return found[1] if found else ""


def _wire(kind: str, size: float, count: int) -> float:
    return {
        "all-reduce": 2 * size * (count - 1) / count,
        "reduce-scatter": float(size * (count - 1)),
        "collective-permute": 0.0,
    }.get(kind, size * (count - 1) / count)


def _group(line: str, kind: str) -> list[int]:
    """The devices of a collective's first group, in any of XLA's three notations; for a permutation, of one hop."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line)
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])
    if (given := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) is not None:
        return [int(device) for device in given[1].split(",")]
    if (iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)) is not None:
        devices = np.arange(int(iota[1]) * int(iota[2])).reshape(_ints(iota[3]))
        if iota[4]:
            devices = devices.transpose(_ints(iota[4]))
        return devices.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    if (named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", line)) is not None:
        return _named_group(named[1], named[2], re.findall(r"'([^']*)'", named[3]))
    return [0]


def _named_group(sizes: str, order: str, axes: list[str]) -> list[int]:
    mesh = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", sizes)}
    devices = np.arange(int(np.prod(list(mesh.values()), dtype=int)))
    if (iota := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)) is not None:
        devices = devices.reshape(_ints(iota[1]))
        devices = devices.transpose(_ints(iota[2])) if iota[2] else devices
    devices = devices.reshape(tuple(mesh.values()))
    return devices[tuple(slice(None) if name in axes else 0 for name in mesh)].reshape(-1).tolist()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))
