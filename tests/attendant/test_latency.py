"""Latency tables are read from what prometheus-client really writes."""

import math
import random
import subprocess
import sys
import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import make_wsgi_app

from attendant._latency import latency_table, read_histograms
from attendant.telemetry import LATENCIES

BOUNDS = [1e-4 * 2**k for k in range(18)]


@pytest.fixture
def registry():
    registry = CollectorRegistry()
    Counter("attendant_other", "something else", ["model"], registry=registry).labels("a/1").inc()
    return registry


@pytest.fixture
def first_token(registry):
    name = LATENCIES["first token"]
    return Histogram(name, "x", ["model", "seq_bucket"], buckets=BOUNDS, registry=registry)


def exposition(registry) -> str:
    return generate_latest(registry).decode()


def test_a_quantile_lies_in_the_bucket_of_the_true_one(registry, first_token):
    rng = random.Random(1)
    seen = sorted(rng.lognormvariate(-4, 1) for _ in range(2000))
    for value in seen:
        first_token.labels("a/1", "64").observe(value)
    histogram = read_histograms(exposition(registry))["first token"][64]
    assert histogram.count == len(seen)
    for q in (0.01, 0.5, 0.95, 0.999):
        true = seen[math.ceil(q * len(seen)) - 1]
        upper = min(bound for bound in BOUNDS if true <= bound)
        assert upper / 2 <= histogram.quantile(q) <= upper


def test_within_a_bucket_a_quantile_is_interpolated_as_promql_does(registry, first_token):
    for _ in range(4):
        first_token.labels("a/1", "64").observe(BOUNDS[3])  # (BOUNDS[2], BOUNDS[3]]
    histogram = read_histograms(exposition(registry))["first token"][64]
    assert histogram.quantile(0.5) == pytest.approx((BOUNDS[2] + BOUNDS[3]) / 2)


def test_models_are_told_apart_or_taken_together(registry, first_token):
    for model, count in (("a/1", 1), ("a/2", 2), ("ab/1", 4), ('q"\\/1', 8)):
        for _ in range(count):
            first_token.labels(model, "64").observe(0.001)
    counts = {
        model: read_histograms(exposition(registry), model=model)["first token"][64].count
        for model in (None, "a", "a/2", "ab", "c")
    }
    assert counts == {None: 15, "a": 3, "a/2": 2, "ab": 4, "c": 0}


def test_the_table_has_a_row_for_each_length_that_was_seen(registry, first_token):
    first_token.labels("a/1", "64").observe(0.001)
    first_token.labels("a/1", "128").observe(1000)
    first_token.labels("a/1", "+Inf").observe(0.001)
    first_token.labels("a/1", "256")
    titles, header, *rows = (line.split("  ") for line in latency_table(exposition(registry)).splitlines())
    assert [title.strip() for title in titles if title] == ["first token", "between tokens", "request"]
    assert [column.strip() for column in header if column] == ["tokens", *["count", "p50", "p95"] * 3]
    cells = [[cell.strip() for cell in row if cell] for row in rows]
    assert [row[:2] for row in cells] == [["<= 64", "1"], ["<= 128", "1"], ["> 256", "1"]]
    assert cells[1][2] == "> 13.1 s"  # beyond the last bound
    assert cells[0][4:] == ["0", "-", "-"] * 2  # nothing was seen of the other metrics


def test_nothing_measured_is_no_table(registry, first_token):
    first_token.labels("a/1", "64")
    assert latency_table(exposition(registry)) is None
    assert latency_table("") is None


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args) -> None:
        pass


def test_the_command_prints_the_table_of_an_endpoint(registry, first_token, free_port):
    first_token.labels("a/1", "64").observe(0.001)
    server = make_server("127.0.0.1", 0, make_wsgi_app(registry), handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def latency(port: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "attendant.cli", "latency", "--metrics", f"http://127.0.0.1:{port}/metrics"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    done = latency(server.server_port)
    server.shutdown()
    thread.join()
    server.server_close()
    assert done.stdout == latency_table(exposition(registry)) + "\n"
    gone = latency(free_port)
    assert gone.returncode == 1 and "cannot read" in gone.stderr and gone.stderr.count("\n") == 1
