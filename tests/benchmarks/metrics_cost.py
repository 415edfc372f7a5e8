"""What metrics cost: the updates of a decode step, and a scrape, with one model and with ten.

    python tests/benchmarks/metrics_cost.py

Figures are the best of many rounds in one process that does nothing else. The updates run on the event loop after a
step's tokens are on their way; a scrape runs on a thread of its own.
"""

import time
from collections.abc import Callable

from service.metrics import ModelMetrics, ServerMetrics
from service.metrics.rendering import render

ROWS = (1, 8, 32, 128)


def best(function: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def model_of(metrics: ServerMetrics, name: str) -> ModelMetrics:
    """Return a model's metrics with some of everything in them."""
    model = metrics.model(name, longest=8192)
    model.memory_is(65536, block_tokens=16, num_slots=128)
    for length in (10, 100, 300, 700, 1500, 3000, 5000):
        model.queued(length, 0.01, "request")
        model.prefilled(length, 0.1, 0, "request")
        model.first_token(length, 0.2, "request")
        model.inter_token(length, 0.09, "request")
        model.succeeded("eos", length, 20, 0.5, first_token_seconds=0.2, request_id="request")
    return model


def decode_step(model: ModelMetrics, rows: int) -> None:
    """Update everything that a decode step updates."""
    for row in range(rows):
        model.inter_token(130 + 17 * row, 0.0265, "request")
    model.generated(rows)
    model.step("decode", rows, rows, 0, 0.0261)
    model.evicted(0)
    model.queue(3, rows, 500, 0.1)
    model.memory(5000, 6000)


def main() -> None:
    """Print both."""
    metrics = ServerMetrics()
    model = model_of(metrics, "model/1")
    print("rows of a step | microseconds of updates | of them a row")
    for rows in ROWS:
        seconds = best(lambda rows=rows: decode_step(model, rows), 2000)
        print(f"{rows:14} | {seconds * 1e6:23.1f} | {seconds / rows * 1e6:13.2f}")
    print("models | series | milliseconds of a scrape: text | OpenMetrics")
    for models in (1, 10):
        for number in range(2, models + 1):
            model_of(metrics, f"model/{number}")
        num_series = sum(len(family.samples) for family in metrics.registry.collect())
        text = best(lambda: render(metrics.registry, "", "gzip"), 50)
        openmetrics = best(lambda: render(metrics.registry, "application/openmetrics-text", "gzip"), 50)
        print(f"{models:6} | {num_series:6} | {text * 1e3:30.1f} | {openmetrics * 1e3:11.1f}")


if __name__ == "__main__":
    main()
