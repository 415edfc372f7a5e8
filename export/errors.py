"""The one error of this room that a caller expects."""

from collections.abc import Mapping


class ExportRefused(Exception):
    """No bundle was written; the message says what is wrong and, for a check, by how much."""


def refuse_others(what: str, config: object, known: Mapping[str, object]) -> None:
    """Refuse a configuration in which a field has another value than the one that export knows.

    Raises:
        ExportRefused: a field differs; the message names it and both values.
    """
    for field, value in known.items():
        if getattr(config, field) != value:
            raise ExportRefused(f"{field} is {getattr(config, field)!r}: export knows {what} with {value!r} only")
