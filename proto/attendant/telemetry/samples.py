"""Samples of Attendant's metrics: read from Prometheus' text format, and what came between two scrapes."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

Scrape: TypeAlias = Mapping[str, float]
"""The value of every series, by the series as it is spelt: `name{label="value"}`."""

_LINE = re.compile(r'((?:attendant_|process_)\w+(?:\{(?:\w+="(?:[^"\\]|\\.)*",?)*\})?) (\S+)(?: .*)?')
_SERIES = re.compile(r"(\w+)(?:\{(.*)\})?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_CUMULATIVE = ("_total", "_bucket", "_sum", "_count")
_STARTED = "process_start_time_seconds"


class Sample(NamedTuple):
    """One series and its value."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(text: str) -> dict[str, float]:
    """Return the series of an exposition that are Attendant's or its process's; all other lines are skipped."""
    return {line[1]: float(line[2]) for line in map(_LINE.fullmatch, text.split("\n")) if line}


def samples(scrape: Scrape) -> Iterator[Sample]:
    """Return a scrape's series with their labels taken apart."""
    for series, value in scrape.items():
        parts = _SERIES.fullmatch(series)
        if parts is not None:
            labels = {name: _unescape(text) for name, text in _LABEL.findall(parts[2] or "")}
            yield Sample(parts[1], labels, value)


def since(newer: Scrape, older: Scrape) -> dict[str, float]:
    """Return a scrape whose counters and histograms hold what came after an older one; gauges are as they are.

    A server that has restarted meanwhile counts from zero, and so does this.
    """
    if is_restarted(newer, older):
        return dict(newer)
    return {
        series: value - older.get(series, 0.0) if _is_cumulative(series) else value for series, value in newer.items()
    }


def is_restarted(newer: Scrape, older: Scrape) -> bool:
    """Whether the two scrapes come from different processes: it started at another time, or a counter fell."""
    if newer.get(_STARTED) != older.get(_STARTED):
        return True
    return any(value < older.get(series, 0.0) for series, value in newer.items() if _is_cumulative(series))


def _is_cumulative(series: str) -> bool:
    return series.partition("{")[0].endswith(_CUMULATIVE)


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
