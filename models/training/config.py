"""Recipe configurations: frozen dataclasses, read from TOML tables in which an unknown name is an error."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A recipe's configuration is wrong; the message names the field."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long a run is, in optimiser steps, and the seed that everything random in it depends on.

    With `autocast` matrix products of the loss are computed in bfloat16: twice as fast on processors that have it.
    Weights and evaluation stay as they are.
    """

    seed: int
    steps: int
    batch_size: int
    evaluate_every: int
    autocast: bool = False

    def __post_init__(self) -> None:
        _at_least(self, seed=0, steps=1, batch_size=1, evaluate_every=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserConfig:
    """AdamW with a linear warm-up and a cosine decay from `learning_rate` to `final_learning_rate`.

    Weight decay spares vectors (norms and biases); gradients are clipped to a total norm of `clip_norm`.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float
    beta2: float
    clip_norm: float

    def __post_init__(self) -> None:
        _at_least(self, learning_rate=0.0, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")


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


def _at_least(config: Any, **limits: float) -> None:
    for name, limit in limits.items():
        if not getattr(config, name) >= limit:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be at least {limit}")
