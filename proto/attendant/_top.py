"""What `attendant top` shows: a frame of text from what a scrape says, in a terminal of any width."""

from collections.abc import Sequence
from math import isfinite

from attendant._latency import QUANTILES
from attendant._terminal import table, visible
from attendant.telemetry import LATENCIES, Histogram, Load, duration, length_names, percent, quantile_text

_LOAD = ("MODEL", "STATE", "RUN", "WAIT", "QUEUE", "TOKENS/S", "BATCH", "PADDING", "KV", "CACHED", "REFUSED", "MISSED")
_SHORT = {"first token": "FIRST", "between tokens": "GAP", "request": "REQUEST"}
_LEAST_NAME = 8  # characters of a model's name that are shown at least


def frame(loads: Sequence[Load], seconds: float | None, *, width: int) -> list[str]:
    """Return the lines that show these loads.

    Args:
        loads: of the models to be shown.
        seconds: over which their counts were collected; None if nobody knows.
        width: columns of the terminal; a table that is wider goes on below itself, and no line is longer.
    """
    if not loads:
        return ["The server has no such model."]
    lines = _blocks(_LOAD, [_load_row(load, seconds, width // 2) for load in loads], width, left=2)
    for load in loads:
        measured = [latency for latency in LATENCIES if any(h.count for h in load.latencies[latency].values())]
        if measured:
            titles = [f"{_SHORT[latency]} {name.upper()}" for latency in measured for name in QUANTILES]
            rows = _latency_rows(load, measured)
            lines += ["", visible(load.model), *_blocks(("TOKENS", "REQUESTS", *titles), rows, width, left=0)]
    return [line[:width] for line in lines]


def _load_row(load: Load, seconds: float | None, name_width: int) -> list[str]:
    return [
        _shortened(visible(load.model), max(_LEAST_NAME, name_width)),
        "ready" if load.is_ready else "not ready",
        str(load.running),
        str(load.waiting),
        duration(load.predicted_queue_seconds),
        f"{load.tokens('output') / seconds:.0f}" if seconds else "-",
        f"{load.batch:.1f}" if isfinite(load.batch) else "-",
        percent(load.padding_share),
        percent(load.kv_usage),
        percent(load.cached_share),
        str(load.refused),
        str(load.missed),
    ]


def _latency_rows(load: Load, measured: Sequence[str]) -> list[list[str]]:
    """Return a row for each range of lengths in which anything was measured."""
    rows = []
    names = length_names({length for latency in measured for length in load.latencies[latency]})
    for length, name in names.items():
        histograms = [load.latencies[latency].get(length, Histogram()) for latency in measured]
        if any(histogram.count for histogram in histograms):
            requests = load.latencies["request"].get(length, Histogram()).count
            quantiles = [quantile_text(histogram, q) for histogram in histograms for q in QUANTILES.values()]
            rows.append([name, str(requests), *quantiles])
    return rows


def _blocks(header: Sequence[str], rows: Sequence[Sequence[str]], width: int, *, left: int) -> list[str]:
    """Return a table as lines; columns for which there is no room go below, each time beside the first column.

    Args:
        header: titles, all different.
        rows: as many cells each.
        width: of the terminal.
        left: so many columns are aligned to the left, the others to the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines: list[str] = []
    begin = 1
    while begin < len(header):
        end, used = begin + 1, widths[0] + 2 + widths[begin]
        while end < len(header) and used + 2 + widths[end] <= width:
            used += 2 + widths[end]
            end += 1
        chosen = [(row[0], *row[begin:end]) for row in (header, *rows)]
        lines += [*([""] if lines else []), *table(chosen[0], chosen[1:], right=header[left:]).splitlines()]
        begin = end
    return lines


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}~"
