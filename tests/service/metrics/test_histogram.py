"""Our histogram exports what the library's would, in both formats, exemplars included."""

import gzip
import random
from math import inf, nextafter

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.metrics import ServerMetrics, buckets
from service.metrics.histogram import Histogram
from service.metrics.rendering import render

BOUNDS = buckets.doubling(21, 0.5)
NAME, TEXT, LABELS = "some_seconds", "What some took.", ("model", "seq_bucket")


def both(values: list[tuple[str, float, str]]) -> tuple[CollectorRegistry, CollectorRegistry]:
    """Observe the same with ours and with the library's."""
    prometheus_client.disable_created_metrics()
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram(NAME, TEXT, LABELS, BOUNDS, unit="seconds", registry=ours)
    reference = prometheus_client.Histogram(NAME, TEXT, LABELS, buckets=BOUNDS, unit="seconds", registry=theirs)
    for bucket, value, request_id in values:
        exemplar = {"request_id": request_id} if request_id else None
        mine.labels("m", bucket).observe(value, exemplar)
        reference.labels("m", bucket).observe(value, exemplar)
    return ours, theirs


def test_it_exports_what_the_library_would() -> None:
    numbers = random.Random(3)
    values = [(numbers.choice(("64", "+Inf")), numbers.lognormvariate(-4, 3), "") for _ in range(3000)]
    values += [("64", value, "") for bound in BOUNDS for value in (bound, nextafter(bound, inf), nextafter(bound, 0))]
    ours, theirs = both([*values, ("64", 0.0, ""), ("64", 1e9, "")])
    assert generate_latest(ours) == generate_latest(theirs)
    assert exposition.generate_latest(ours) == exposition.generate_latest(theirs)


def test_exemplars_are_the_newest_of_their_bucket_and_only_in_openmetrics() -> None:
    awkward = 'a "quoted"\\{id=1}'
    ours, _ = both([("64", 0.3, "first"), ("64", 0.35, "second"), ("64", 7.0, awkward), ("64", 7.1, "")])
    assert b"request_id" not in generate_latest(ours)
    (family,) = text_string_to_metric_families(exposition.generate_latest(ours).decode())
    found = {(s.labels["le"], s.exemplar.labels["request_id"], s.exemplar.value) for s in family.samples if s.exemplar}
    assert found == {("0.4096", "second", 0.35), ("13.1072", awkward, 7.0)}


def test_labels_are_as_many_as_were_declared() -> None:
    histogram = Histogram(NAME, TEXT, LABELS, BOUNDS, unit="seconds", registry=CollectorRegistry())
    with pytest.raises(AssertionError, match="seq_bucket"):
        histogram.labels("m")


def test_the_longest_name_of_a_request_fits_into_an_exemplar_and_only_slow_gaps_leave_one() -> None:
    metrics = ServerMetrics()
    model = metrics.model("m/1", longest=8192)
    model.first_token(10, 0.1, "x" * 128)
    model.inter_token(10, 0.01, "fast")
    model.inter_token(10, 0.5, "slow")
    page = exposition.generate_latest(metrics.registry).decode()
    names = {
        sample.exemplar.labels["request_id"]
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.exemplar
    }
    assert names == {"x" * 118, "slow"}


def test_what_is_served_is_what_the_library_would_serve() -> None:
    ours, _ = both([("64", 0.3, "first"), ("+Inf", 7.0, 'a "quoted"\\{id=1}')])
    prometheus_client.Counter("done", "What is\ndone.", ("model",), registry=ours).labels('awkward "\\\n').inc()
    formats = {
        "": (generate_latest(ours), "text/plain; version=0.0.4; charset=utf-8"),
        "text/plain;version=0.0.4;q=0.4,*/*;q=0.1": (generate_latest(ours), "text/plain; version=0.0.4; charset=utf-8"),
        "application/openmetrics-text;version=1.0.0;q=0.7,text/plain;q=0.3": (
            exposition.generate_latest(ours),
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    }
    for accept, (expected, content_type) in formats.items():
        assert render(ours, accept, "") == (expected, {"Content-Type": content_type})
        body, headers = render(ours, accept, "deflate, gzip;q=1.0")
        assert (gzip.decompress(body), headers["Content-Encoding"]) == (expected, "gzip")
