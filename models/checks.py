"""Checks of configuration fields; each error names the field, its value and the limit."""

from collections.abc import Collection
from typing import Any


def check_integers(config: Any, least: int, *names: str) -> None:
    """Check that the named fields are integers of at least `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")


def check_positive(config: Any, *names: str) -> None:
    """Check that the named fields are above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value!r}; it must be above 0")


def check_choices(config: Any, **choices: Collection[str]) -> None:
    """Check that each named field is one of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(allowed)}")


def check_shares(config: Any, *names: str) -> None:
    """Check that the named fields lie in [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} is {getattr(config, name)}; it must lie in [0, 1)")
