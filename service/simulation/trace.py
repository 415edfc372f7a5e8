"""What arrives: requests as a trace records them.

A trace is JSON lines, or CSV with a header; the names are those of `Arrival`'s fields. `arrival_seconds`,
`prompt_tokens` and `output_tokens` are needed, everything else may be left out or empty.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


class TraceError(ValueError):
    """A trace cannot be read; the message names file, line and field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace.

    Args:
        arrival_seconds: after the beginning of the trace.
        prompt_tokens: that it sends.
        output_tokens: that it gets, if it is let finish.
        max_tokens: that it asks for, and so reserves; `output_tokens` if None.
        budget_seconds: after its arrival it is of no use any more; None if it always is.
        priority: larger is more urgent.
        tenant: who shares fairly with whom.
        prefix_group: prompts of one group begin with the same `prefix_tokens` tokens; empty for none.
        prefix_tokens: see above.

    Raises:
        ValueError: a field is out of range.
    """

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    budget_seconds: float | None = None
    priority: int = 0
    tenant: str = ""
    prefix_group: str = ""
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_seconds) and self.arrival_seconds >= 0):
            raise ValueError(f"arrival_seconds is {self.arrival_seconds}, must be finite and at least 0")
        for name in ("prompt_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.output_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens}, must be at least output_tokens, {self.output_tokens}")
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise ValueError(f"budget_seconds is {self.budget_seconds}, must be positive")
        if not 0 <= self.prefix_tokens <= self.prompt_tokens:
            raise ValueError(f"prefix_tokens is {self.prefix_tokens}, must be in [0, {self.prompt_tokens}]")

    @property
    def due_seconds(self) -> float:
        """When it is of no use any more, after the beginning of the trace."""
        return math.inf if self.budget_seconds is None else self.arrival_seconds + self.budget_seconds


_FIELDS = {field.name: field for field in fields(Arrival)}
_NUMBERS = {"prompt_tokens", "output_tokens", "max_tokens", "priority", "prefix_tokens"}
_SECONDS = {"arrival_seconds", "budget_seconds"}


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace, by the file's name CSV or else JSON lines; the earliest arrival comes first.

    Raises:
        TraceError: it cannot be read, or has no requests.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _csv_rows(file) if path.suffix == ".csv" else _json_rows(file)
            arrivals = [_arrival(row, f"{path}, line {number}") for number, row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        raise TraceError(
            f"{path}: a line is no JSON object: {error.msg}; a CSV file's name must end in .csv"
        ) from error
    if not arrivals:
        raise TraceError(f"{path}: it has no requests")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_seconds)


def write_trace(path: Path, arrivals: Iterable[Arrival]) -> None:
    """Write a trace as `read_trace` reads it; as JSON lines what has its default is left out."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, fieldnames=list(_FIELDS), lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(arrival) for arrival in arrivals)
            return
        for arrival in arrivals:
            said = {name: value for name, value in asdict(arrival).items() if value != _FIELDS[name].default}
            file.write(json.dumps(said) + "\n")


def _csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(lines, restkey="more values than the header has")
    for row in reader:
        yield reader.line_num, {name: value for name, value in row.items() if value not in ("", None)}


def _json_rows(lines: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = json.loads(line)
            yield number, row if isinstance(row, dict) else {"a line that is no object": row}


def _arrival(row: Mapping[str, Any], where: str) -> Arrival:
    if unknown := sorted(row.keys() - _FIELDS.keys()):
        raise TraceError(f"{where}: unknown field {unknown[0]!r}; fields are {', '.join(_FIELDS)}")
    if missing := [name for name in ("arrival_seconds", "prompt_tokens", "output_tokens") if row.get(name) is None]:
        raise TraceError(f"{where}: {missing[0]} is missing")
    values: dict[str, Any] = {}
    for name, value in row.items():
        try:
            if value is not None:
                values[name] = int(value) if name in _NUMBERS else float(value) if name in _SECONDS else str(value)
        except (TypeError, ValueError) as error:
            raise TraceError(f"{where}: {name} is {value!r}, must be a number") from error
    try:
        return Arrival(**values)
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from error
