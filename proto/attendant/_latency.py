"""Latency by sequence length, from the histograms that a server shows to Prometheus."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from math import inf

from attendant._terminal import duration, table

METRICS = {
    "first token": "attendant_time_to_first_token_seconds",
    "between tokens": "attendant_inter_token_latency_seconds",
    "request": "attendant_request_duration_seconds",
}
QUANTILES = {"p50": 0.5, "p95": 0.95}

_SAMPLE = re.compile(r"(?P<name>[a-z_]+)_bucket\{(?P<labels>.*)\} (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Histogram:
    """Cumulative counts by upper bound, in seconds; the last bound is infinite."""

    counts: dict[float, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def count(self) -> int:
        """How many were observed."""
        return int(self.counts.get(inf, 0))

    def quantile(self, q: float) -> float:
        """Return the q-quantile as PromQL's histogram_quantile does: linear inside its bucket.

        Beyond the last finite bound nothing is known, and the answer is infinite.
        """
        rank, low, below = q * self.count, 0.0, 0.0
        for bound, count in sorted(self.counts.items()):
            if count >= rank:
                return inf if bound == inf else low + (bound - low) * (rank - below) / (count - below or 1)
            low, below = bound, count
        return inf


def read_histograms(text: str, *, model: str | None = None) -> dict[str, dict[float, Histogram]]:
    """Return the latency histograms in a Prometheus exposition, by metric name and length bucket.

    Args:
        text: what the metrics endpoint answers.
        model: only this model's ("name" or "name/version"); otherwise those of all models together.
    """
    result: dict[str, dict[float, Histogram]] = {name: defaultdict(Histogram) for name in METRICS.values()}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line)
        if sample is None or sample["name"] not in result:
            continue
        labels = dict(_LABEL.findall(sample["labels"]))
        if model is None or labels["model"] in (model, f"{model}/{labels['model'].rpartition('/')[2]}"):
            histogram = result[sample["name"]][float(labels["seq_bucket"])]
            histogram.counts[float(labels["le"])] += float(sample["value"])
    return result


def latency_table(text: str, *, model: str | None = None) -> str | None:
    """Return a table of latencies by sequence length, or None if nothing has been measured."""
    histograms = read_histograms(text, model=model)
    lengths = sorted({length for found in histograms.values() for length, h in found.items() if h.count})
    if not lengths:
        return None
    titles = ["", *(title for what in METRICS for title in (what, *("" for _ in QUANTILES)))]
    rows = [["tokens", *(["count", *QUANTILES] * len(METRICS))]]
    shorter = dict(zip(lengths[1:], lengths, strict=False))
    for length in lengths:
        cells = [f"<= {length:g}" if length < inf else f"> {shorter.get(length, 0):g}"]
        for metric in METRICS.values():
            histogram = histograms[metric].get(length, Histogram())
            cells.append(str(histogram.count))
            cells += [_show(histogram, q) for q in QUANTILES.values()]
        rows.append(cells)
    return table(titles, rows, right=titles)


def _show(histogram: Histogram, q: float) -> str:
    if not histogram.count:
        return "-"
    value = histogram.quantile(q)
    if value < inf:
        return duration(value)
    return f"> {duration(max(bound for bound in histogram.counts if bound < inf))}"
