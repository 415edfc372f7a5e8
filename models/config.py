"""Configurations from tables: TOML or JSON into frozen dataclasses, in which an unknown name is an error."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe's configuration is wrong; the message names the field."""


def from_file(cls: type[T], path: Path) -> T:
    """Build the dataclass `cls` from a TOML file.

    Raises:
        ConfigError: the file is no TOML, or see `from_table`; the message names the file.
    """
    try:
        return from_table(cls, tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


def from_table(cls: type[T], table: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from a table; fields that are dataclasses come from tables of their own.

    Raises:
        ConfigError: a name is unknown or missing, a value has the wrong type or is out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(table.keys() - fields.keys()):
        raise ConfigError(f"{path}{unknown[0]} is unknown; known are {', '.join(fields)}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    if missing := sorted(required - table.keys()):
        raise ConfigError(f"{path}{missing[0]} is missing")
    kinds = typing.get_type_hints(cls)
    values = {name: _value(kinds[name], value, f"{path}{name}") for name, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{path}{error}") from error


def _value(kind: Any, value: Any, path: str) -> Any:
    if isinstance(kind, types.UnionType):  # a table says None by leaving the name out
        kind = next(choice for choice in typing.get_args(kind) if choice is not type(None))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}; it must be a table")
        return from_table(kind, value, f"{path}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = kind if isinstance(kind, type) else str  # what is no plain type is a choice of words
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{path} is {value!r}; it must be of type {plain.__name__}")
    return value
