"""What the metrics of a server say, as values: loads, latencies by sequence length, and what a length costs.

    from attendant.telemetry import loads, parse, samples, since

    for load in loads(samples(since(parse(newer_text), parse(older_text)))):
        print(load.model, load.running, load.tokens("output"))

Pure functions of samples. `attendant top` reads them from a scrape, the server's status page from its own registry.
"""

from attendant.telemetry.cost import Law, predicted_seconds
from attendant.telemetry.histogram import Histogram
from attendant.telemetry.loads import LATENCIES, METRICS, Load, loads
from attendant.telemetry.samples import Sample, Scrape, is_restarted, parse, samples, since
from attendant.telemetry.words import duration, length_names, percent, quantile_text

__all__ = [
    "LATENCIES",
    "METRICS",
    "Histogram",
    "Law",
    "Load",
    "Sample",
    "Scrape",
    "duration",
    "is_restarted",
    "length_names",
    "loads",
    "parse",
    "percent",
    "predicted_seconds",
    "quantile_text",
    "samples",
    "since",
]
