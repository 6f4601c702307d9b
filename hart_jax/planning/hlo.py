"""What one device does in one execution of a compiled program, read from the program's text.

XLA's own cost analysis counts the body of a loop once; here a body counts as often as it runs.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from hart_jax.planning.collectives import KINDS, Collective, collective_of, rendezvous, transfer_of

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "f64": 8}
# Values that have no memory of their own, or whose traffic is that of the operations inside them.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "async-start", "optimization-barrier",
}  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")
# What takes so long that something else can be sent meanwhile.
_WORK = {"fusion", "dot", "convolution", "custom-call", "while", "conditional", "call"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_STATED_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TRACED = re.compile(r'op_name="([^"]*)"')
_WINDOW = re.compile(r"\b(size|stride|pad|lhs_dilate|rhs_dilate)=([\dx_\-]+)")


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device: `flops` of matrix products and convolutions, `bytes` read and written in its main memory, and
    `collective_bytes`, the bytes that each kind of collective must at least put on its links."""

    flops: float
    bytes: float
    collective_bytes: dict[Collective, float]


@dataclasses.dataclass(frozen=True)
class _Operation:
    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    line: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One operation that reads or writes main memory: the names of the traced operations in it, how often it runs, and
    the bytes that each run moves. `products` of matrices in it, or a call of a library or a kernel of one's own."""

    name: str
    traced: tuple[str, ...]
    runs: float
    bytes: float
    products: bool
    call: bool


def kernels_of(text: str) -> list[Kernel]:
    """The kernels of a compiled program of one device, in the order of its text."""
    return _Program(text).kernels()


def count_work(text: str, mesh: Mapping[str, int], island: int = 0) -> Work:
    """Counts the text of a compiled program whose devices form a mesh (axis -> size), in the mesh's order.

    A loop runs as often as its annotation or the bound in its condition says, and once if there is neither. Where the
    compiler keeps an array in on-chip memory, its reads and writes do not count. `island` is how many devices, in the
    mesh's order, have fast links to each other: those of a slice, or of a host of GPUs; 0: all.
    """
    return _Program(text).work(mesh, island)


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, list[_Operation]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if (start := _COMPUTATION.match(line)) is not None:
                current = start[2]
                self.computations[current] = []
                self.entry = current if start[1] else self.entry
            elif current and (found := _OPERATION.match(line)) is not None:
                operands = tuple(re.findall(r"%([\w.\-]+)", _until_closed(line[found.end() :])))
                self.computations[current].append(
                    _Operation(found[2], found[3], found[4], operands, line, bool(found[1]))
                )
        self.results = {name: {op.name: op.result for op in ops} for name, ops in self.computations.items()}

    def work(self, mesh: Mapping[str, int], island: int) -> Work:
        flops = size = 0.0
        sent: dict[str, tuple[Collective, float, bool]] = {}
        overlapping = self._overlapping()
        for name, (times, within) in self._runs().items():
            for op in self.computations[name]:
                if op.kind in ("dot", "convolution"):
                    flops += times * self._flops(op, name)
                elif op.kind == "custom-call" and (stated := _STATED_FLOPS.search(op.line)) is not None:
                    # A Pallas kernel's own estimate.
                    flops += times * float(stated[1])
                if not within:
                    size += times * self._traffic(op, name)
                kind = op.kind.removesuffix("-start")
                found: tuple[Collective, float] | None = None
                if kind in KINDS:
                    results = _sizes_anywhere(op.result)
                    result = max(results, default=0) if op.kind.endswith("-start") else sum(results)
                    found = collective_of(op.line, kind, result, mesh, island)
                elif kind == "send":
                    found = transfer_of(op.line, max(_sizes_anywhere(op.result), default=0), mesh, island)
                if found is not None:
                    collective, wire = found
                    # One that overlaps with other work appears in each part of that work, under one channel.
                    channel = None if kind == "send" else re.search(r"channel_id=(\d+)", op.line)
                    key = channel[0] if channel else f"{name} {op.name}"
                    before = sent.get(key, (collective, 0.0, False))
                    overlaps = before[2] or op.name in overlapping.get(name, ())
                    wire = max(before[1], times * wire)
                    sent[key] = (collective if wire > before[1] else before[0]), wire, overlaps
        totals: dict[Collective, float] = collections.defaultdict(float)
        for collective, wire, overlaps in sent.values():
            if wire:
                totals[dataclasses.replace(collective, overlaps=overlaps)] += wire
        return Work(flops, size, dict(totals))

    def _overlapping(self) -> dict[str, set[str]]:
        """Computation -> its collectives that other work stands beside: between their start and their end, in the
        order in which the program runs, or with them in one fusion."""
        found: dict[str, set[str]] = collections.defaultdict(set)
        for name, ops in self.computations.items():
            works = [at for at, op in enumerate(ops) if op.kind in _WORK]
            ends = _ends(ops)
            for at, op in enumerate(ops):
                inside = [each for _, called in _calls(op) for each in self.computations.get(called, ())]
                beside = op.kind == "fusion" and any(each.kind in ("fusion", "dot", "convolution") for each in inside)
                if beside or any(at < work < ends.get(op.name, at) for work in works):
                    found[name].add(op.name)
                    for _, called in _calls(op):
                        found[called].update(each.name for each in self.computations.get(called, ()))
        return found

    def kernels(self) -> list[Kernel]:
        found = []
        for name, (times, within) in self._runs().items():
            for op in self.computations[name]:
                size = 0.0 if within else self._traffic(op, name)
                if size:
                    inner = [op, *self._inside(op)]
                    traced = dict.fromkeys(match[1] for each in inner if (match := _TRACED.search(each.line)))
                    products = any(each.kind in ("dot", "convolution") for each in inner)
                    found.append(Kernel(op.name, tuple(traced), times, size, products, op.kind == "custom-call"))
        return found

    def _inside(self, op: _Operation) -> Iterator[_Operation]:
        if op.kind == "fusion":
            for _, called in _calls(op):
                for each in self.computations.get(called, ()):
                    yield each
                    yield from self._inside(each)

    def _runs(self) -> dict[str, tuple[float, bool]]:
        """Computation -> how often it runs, and whether within one operation, whose values never reach memory."""
        times: dict[str, float] = collections.defaultdict(float)
        inside: dict[str, bool] = {}

        def visit(name: str, count: float, within: bool) -> None:
            times[name] += count
            inside[name] = within
            for op in self.computations.get(name, ()):
                trips = self._trips(op) if op.kind == "while" else 1
                for role, called in _calls(op):
                    applied = role == "to_apply" and op.kind != "call"
                    fused = within or applied or op.kind in ("fusion", "custom-call")
                    visit(called, count * (trips if role == "body" else 1), fused)

        visit(self.entry, 1, False)
        return {name: (count, inside[name]) for name, count in times.items() if name in self.computations}

    def _trips(self, loop: _Operation) -> int:
        if (known := _TRIPS.search(loop.line)) is not None:
            return int(known[1])
        condition = dict(_calls(loop)).get("condition", "")
        bounds = [
            int(bound[1])
            for op in self.computations.get(condition, ())
            if op.kind == "constant" and (bound := re.search(r"constant\((\d+)\)", op.line)) is not None
        ]
        return bounds[0] if len(bounds) == 1 else 1

    def _flops(self, op: _Operation, name: str) -> float:
        (_, out), (_, left), (_, right) = (_dims(text) for text in (op.result, *self._shapes(op, name)[:2]))
        if op.kind == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.line)
            contracted = [left[int(axis)] for axis in filter(None, (axes[1] if axes else "").split(","))]
            return 2.0 * np.prod(out) * np.prod(contracted)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.line)
        if labels is None:
            return 0.0
        window = {name: value.split("x") for name, value in _WINDOW.findall(op.line.split("dim_labels")[0])}
        spatial = sorted(label for label in labels[3] if label.isdigit())
        pairs = 1.0
        for axis, label in enumerate(spatial):
            pad = window["pad"][axis] if "pad" in window else "0_0"
            pairs *= _products(
                left[labels[1].index(label)],
                right[labels[2].index(label)],
                out[labels[3].index(label)],
                int(window["stride"][axis]) if "stride" in window else 1,
                int(pad.split("_")[0]),
                int(window["lhs_dilate"][axis]) if "lhs_dilate" in window else 1,
                int(window["rhs_dilate"][axis]) if "rhs_dilate" in window else 1,
            )
        batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
        groups = re.search(r"batch_group_count=(\d+)", op.line)
        if groups is not None:
            batch = left[labels[1].index("b")] // int(groups[1])
        return 2.0 * pairs * batch * features * right[labels[2].index("i")]

    def _shapes(self, op: _Operation, name: str) -> list[str]:
        return [self.results[name].get(operand, "") for operand in op.operands]

    def _traffic(self, op: _Operation, name: str) -> float:
        """Bytes that one run of an operation reads and writes."""
        if op.kind in _FREE or op.kind.endswith(("-done", "-update")):
            return 0.0
        shapes = self._shapes(op, name)
        if op.kind.removesuffix("-start") in KINDS or op.kind == "copy-start":
            # What is started gives (operand, result, ...): both, once.
            return float(sum(_sizes(op.result))) if op.kind.endswith("-start") else _total([op.result, *shapes])
        if op.kind in _SLICES:
            return float(sum(_sizes(op.result)) + (_elements(op.result) if _in_memory(shapes[0]) else 0))
        if op.kind == "dynamic-update-slice":
            return _total([shapes[1]]) + (_elements(shapes[1]) if _in_memory(op.result) else 0)
        called = dict(_calls(op)).get("calls")
        if op.kind != "fusion" or called not in self.computations:
            return _total([op.result, *shapes])
        reads = sum(
            min(_total([shape]), self._read_of(called, index))
            for index, shape in enumerate(shapes)
            if _in_memory(shape)
        )
        return reads + self._written_by(called, op.result)

    @functools.cache  # noqa: B019 - a program lives as long as its count
    def _read_of(self, name: str, index: int) -> float:
        """Bytes that a fusion reads of its operand number `index`: less than all of it if it only slices it."""
        parameter = next(
            (op for op in self.computations[name] if op.kind == "parameter" and f"parameter({index})" in op.line), None
        )
        if parameter is None:
            return 0.0
        gathered = _gathered(self.computations[name])
        if gathered and _dims(parameter.result) in gathered:
            return 0.0
        return self._read_as(name, parameter)

    def _read_as(self, name: str, value: _Operation) -> float:
        total = 0.0
        for user in self.computations[name]:
            if value.name not in user.operands:
                continue
            place = user.operands.index(value.name)
            called = dict(_calls(user)).get("calls", "")
            if user.kind in _SLICES and place == 0:
                total += _elements(user.result)
            elif user.kind == "dynamic-update-slice" and place == 0:
                continue
            elif user.kind == "bitcast":
                total += self._read_as(name, user)
            elif user.kind == "fusion" and called in self.computations:
                total += self._read_of(called, place)
            elif user.kind != "tuple":
                return float(_elements(value.result))
        return min(total, float(_elements(value.result)))

    def _written_by(self, name: str, result: str) -> float:
        """Bytes that a fusion writes: of what it updates in place, only the update."""
        operations = {op.name: op for op in self.computations[name]}
        root = next(op for op in operations.values() if op.root)
        outputs = [operations[operand] for operand in root.operands] if root.kind == "tuple" else [root]
        shapes = [match[0] for match in _SHAPE.finditer(result)]
        gathered = _gathered(list(operations.values()))
        total = 0.0
        for output, shape in zip(outputs, shapes, strict=False):
            while output.kind == "bitcast" and output.operands[0] in operations:
                output = operations[output.operands[0]]
            called = dict(_calls(output)).get("calls", "")
            if not _in_memory(shape) or output.kind == "parameter" or (gathered and _dims(shape) in gathered):
                continue
            if output.kind == "dynamic-update-slice":
                total += _elements(self.results[name].get(output.operands[1], shape))
            elif output.kind == "fusion" and called in self.computations:
                total += self._written_by(called, shape)
            else:
                total += _elements(shape)
        return total


def _ends(ops: list[_Operation]) -> dict[str, int]:
    """What is started in a computation -> the place of what waits for it."""
    places = {op.name: at for at, op in enumerate(ops)}
    waits = {operand: at for at, op in enumerate(ops) if op.kind.endswith("-done") for operand in op.operands[:1]}
    received = {rendezvous(op.line): waits[op.name] for op in ops if op.kind == "recv" and op.name in waits}
    ends = {}
    for op in ops:
        if op.kind == "send":
            ends[op.name] = received.get(rendezvous(op.line), waits.get(op.name, 0))
        elif op.kind.endswith("-start"):
            ends[op.name] = waits.get(op.name, 0)
        elif op.name.startswith("async-collective-start"):
            # How a TPU's compiler names fusions that start and end what others go on with.
            ends[op.name] = places.get(op.name.replace("-start", "-done"), 0)
    return ends


def _until_closed(text: str) -> str:
    depth = 1
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:index]
    return text


def _calls(op: _Operation) -> list[tuple[str, str]]:
    calls = _CALLED.findall(op.line)
    if (branches := _BRANCHES.search(op.line)) is not None:
        calls += [("branch", name.strip().lstrip("%")) for name in branches[1].split(",")]
    return calls


def _dims(text: str) -> tuple[str, tuple[int, ...]]:
    """Type and sides of the first shape in a text."""
    shape = _SHAPE.search(text)
    return (shape[1], tuple(int(side) for side in filter(None, shape[2].split(",")))) if shape else ("", ())


def _gathered(operations: list[_Operation]) -> set[tuple[str, tuple[int, ...]]]:
    """Shapes of collectives' results inside a fusion: parts of the work they overlap with only pass them on."""
    return {_dims(op.result) for op in operations if op.kind in KINDS}


def _each(text: str) -> Iterator[tuple[int, bool]]:
    """Bytes of every shape in a text, and whether it lies in main memory: layouts name other memories, as S(1)."""
    for dtype, sides, layout in _SHAPE.findall(text):
        count = int(np.prod([int(side) for side in filter(None, sides.split(","))], dtype=np.int64))
        yield count * _BYTES.get(dtype, 4), re.search(r"S\([1-9]", layout) is None


def _sizes(text: str) -> list[int]:
    return [size for size, in_memory in _each(text) if in_memory]


def _elements(text: str) -> int:
    return sum(size for size, _ in _each(text))


def _total(texts: list[str]) -> float:
    return float(sum(sum(_sizes(text)) for text in texts))


def _in_memory(text: str) -> bool:
    return all(in_memory for _, in_memory in _each(text))


def _products(left: int, window: int, out: int, stride: int, pad: int, left_dilation: int, dilation: int) -> int:
    """How many pairs of an output and a window position along one side meet an element, not padding or a hole."""
    at = np.arange(out)[:, None] * stride + np.arange(window) * dilation - pad
    return int(((at >= 0) & (at <= (left - 1) * left_dilation) & (at % left_dilation == 0)).sum())


def _sizes_anywhere(text: str) -> list[int]:
    return [size for size, _ in _each(text)]
