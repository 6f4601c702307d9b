"""What all settings have in common: they are frozen, built from mappings, and every value is checked once."""

import contextlib
import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.files import read_json
from hart_jax.io.fingerprint import differences, told

# Of a setting that was added when there were models already: while it is neutral, files and digests do not name it.
LATER = types.MappingProxyType({"later": True})


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all settings: built from a mapping, where an unknown key is an error."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings with these values; lists become tuples, nested settings are built from nested mappings."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        require(not unknown, f"{cls.__name__}: unknown key {', '.join(unknown)}; known: {', '.join(fields)}")
        arguments = {}
        for name, value in values.items():
            kind = type(fields[name].default)
            if issubclass(kind, Settings) and isinstance(value, Mapping):
                value = kind.from_dict(value)
            value = tuple(value) if isinstance(value, list) else value
            arguments[name] = _typed(value, _types(cls)[name], f"{cls.__name__}.{name}={value!r}")
        return cls(**arguments)

    def require_types(self) -> None:
        """Raises `UserError` for a value of another type than its setting's; a whole number is a float, too."""
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            _typed(value, kind, f"{type(self).__name__}.{name}={value!r}")

    @classmethod
    def read(cls, path: Path) -> Self:
        """The settings in a JSON file; `UserError`, naming the file, if it is missing or holds something else."""
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def names(cls) -> list[str]:
        """Of all settings, nested ones as "train.steps"."""
        found = []
        for field in dataclasses.fields(cls):
            nested = type(field.default).names() if isinstance(field.default, Settings) else [""]
            found += [f"{field.name}.{name}".removesuffix(".") for name in nested]
        return found

    def listing(self, prefix: str = "") -> str:
        """All settings with their values and defaults, group by group, each with what it means; for `--help`."""
        lines, groups = [inspect.getdoc(type(self)) or "", ""], []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Settings):
                groups.append(value.listing(f"{prefix}{field.name}."))
                continue
            default = "" if value == field.default else f"    (default: {field.default!r})"
            lines.append(f"  {prefix}{field.name}={value}{default}")
        return "\n\n".join(["\n".join(lines), *groups])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON writes them; without settings `LATER` that have no effect."""
        values = {
            field.name: value.to_dict() if isinstance(value, Settings) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.metadata != LATER
        }
        return json.loads(json.dumps(values))

    def check_same(self, theirs: Self, source: str | Path, part: str) -> None:
        """Raises `UserError` unless the settings `theirs`, found in `source`, are these; it names what differs."""
        changed = differences({part: theirs.to_dict()}, {part: self.to_dict()})
        listed = told(changed, "{name} is {there!r}, the config says {here!r}")
        require(not changed, f"{source}: a checkpoint of another config: {listed}")


def _types(settings: type[Settings]) -> dict[str, Any]:
    """The type of each setting."""
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def _typed(value: Any, kind: Any, said: str) -> Any:
    """The value as a setting's type has it; `UserError`, which begins as `said`, where it is of another."""
    try:
        value = _converted(value, kind)
    except TypeError:
        raise UserError(f"{said}: expected {_named(kind, isinstance(value, list | tuple))}") from None
    finite = all(math.isfinite(number) for number in _flat(value) if isinstance(number, float))
    require(finite, f"{said}: must be finite")
    return value


def _converted(value: Any, kind: Any) -> Any:
    """As `_typed`: lists are tuples, whole numbers floats where those are asked for; `TypeError` for another type."""
    if isinstance(value, np.generic):
        # Of an array that one goes through, like `np.linspace`.
        value = value.item()
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            with contextlib.suppress(TypeError):
                return _converted(value, option)
    elif typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        items = typing.get_args(kind)
        items = items[:1] * len(value) if items[-1] is ... else items
        if len(items) == len(value):
            return tuple(map(_converted, value, items))
    elif kind is float and type(value) is int:
        # What is too large for a float is not finite.
        return float(value) if abs(value) < 2**1023 else math.inf
    elif type(value) is kind:
        return value
    raise TypeError


def _flat(value: Any) -> Iterator[Any]:
    for entry in value if isinstance(value, tuple) else ():
        yield from _flat(entry)
    if not isinstance(value, tuple):
        yield value


def _named(kind: Any, entries: bool) -> str:
    """A type in words; of a tuple with its `entries`, where it is those that are wrong."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_named(option, entries) for option in typing.get_args(kind))
    if typing.get_origin(kind) is not tuple:
        return kind.__name__
    items = typing.get_args(kind)
    if items[-1] is ...:
        return f"a tuple of {_named(items[0], entries)}" if entries else "tuple"
    return f"({', '.join(_named(item, entries) for item in items)})"
