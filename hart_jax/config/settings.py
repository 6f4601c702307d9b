"""What all settings have in common: they are frozen, built from mappings, and every value is checked once."""

import dataclasses
import inspect
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from hart_jax.errors import UserError
from hart_jax.io.files import read_json
from hart_jax.io.fingerprint import differences, told


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
            if isinstance(value, np.generic):
                # Of an array that one goes through, like `np.linspace`.
                value = value.item()
            if issubclass(kind, Settings) and isinstance(value, Mapping):
                value = kind.from_dict(value)
            elif isinstance(value, list):
                value = tuple(value)
            elif kind is float and type(value) is int:
                # What is too large for a float is not finite.
                value = float(value) if abs(value) < 2**1023 else math.inf
            cls._require_type(fields[name], value)
            if isinstance(value, tuple):
                (item, _) = typing.get_args(fields[name].type)
                if item is float:
                    value = tuple(float(entry) if type(entry) is int else entry for entry in value)
                fits = all(type(entry) is item for entry in value)
                require(fits, f"{cls.__name__}.{name}={value!r}: expected a tuple of {item.__name__}")
            for number in value if isinstance(value, tuple) else (value,):
                finite = not isinstance(number, float) or math.isfinite(number)
                require(finite, f"{cls.__name__}.{name}={value!r}: must be finite")
            arguments[name] = value
        return cls(**arguments)

    @classmethod
    def _require_type(cls, field: dataclasses.Field, value: Any) -> None:
        kind = type(field.default)
        require(type(value) is kind, f"{cls.__name__}.{field.name}={value!r}: expected {kind.__name__}")

    def require_types(self) -> None:
        """Raises `UserError` for a value of another type than its setting's; a whole number is a float, too."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (type(value) is int and isinstance(field.default, float)):
                self._require_type(field, value)

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
        """Plain values, as JSON writes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def check_same(self, theirs: Self, source: str | Path, part: str) -> None:
        """Raises `UserError` unless the settings `theirs`, found in `source`, are these; it names what differs."""
        changed = differences({part: theirs.to_dict()}, {part: self.to_dict()})
        listed = told(changed, "{name} is {there!r}, the config says {here!r}")
        require(not changed, f"{source}: a checkpoint of another config: {listed}")
