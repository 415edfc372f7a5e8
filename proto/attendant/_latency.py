"""Latency by sequence length, from the histograms that a server shows to Prometheus."""

from collections import defaultdict

from attendant._terminal import table
from attendant.telemetry import LATENCIES, Histogram, length_names, loads, parse, quantile_text, samples

QUANTILES = {"p50": 0.5, "p95": 0.95}


def read_histograms(text: str, *, model: str | None = None) -> dict[str, dict[float, Histogram]]:
    """Return the latency histograms in a Prometheus exposition, by what they measure and length bucket.

    Args:
        text: what the metrics endpoint answers.
        model: only this model's ("name" or "name/version"); otherwise those of all models together.
    """
    result: dict[str, dict[float, Histogram]] = {latency: defaultdict(Histogram) for latency in LATENCIES}
    for load in loads(samples(parse(text))):
        if load.is_called(model):
            for latency, by_length in load.latencies.items():
                for length, histogram in by_length.items():
                    for bound, count in histogram.counts.items():
                        result[latency][length].counts[bound] += count
    return result


def latency_table(text: str, *, model: str | None = None) -> str | None:
    """Return a table of latencies by sequence length, or None if nothing has been measured."""
    histograms = read_histograms(text, model=model)
    lengths = sorted({length for found in histograms.values() for length, h in found.items() if h.count})
    if not lengths:
        return None
    titles = ["", *(title for what in LATENCIES for title in (what, *("" for _ in QUANTILES)))]
    rows = [["tokens", *(["count", *QUANTILES] * len(LATENCIES))]]
    names = length_names({length for found in histograms.values() for length in found})
    for length in lengths:
        cells = [names[length]]
        for latency in LATENCIES:
            histogram = histograms[latency].get(length, Histogram())
            cells.append(str(histogram.count))
            cells += [quantile_text(histogram, q) for q in QUANTILES.values()]
        rows.append(cells)
    return table(titles, rows, right=titles)
