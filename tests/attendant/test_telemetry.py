"""Samples become values as Prometheus' own client reads them, and curves as the server's latency model predicts."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from attendant.telemetry import Law, duration, is_restarted, loads, parse, predicted_seconds, samples, since
from service.scheduling.latency import LatencyModel
from service.scheduling.work import Work, decode_work, encode_work, prefill_work

LABEL = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=8)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.dictionaries(LABEL, st.floats(), min_size=1, max_size=4))
def test_series_are_read_as_prometheus_own_client_reads_them(values: dict[str, float]) -> None:
    registry = CollectorRegistry()
    gauge = Gauge("attendant_something", "what\nit is", ["model", "kind"], registry=registry)
    for label, value in values.items():
        gauge.labels(label, "} 1").set(value)
    text = generate_latest(registry).decode()
    expected = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = list(samples(parse(text)))
    assert [(s.name, s.labels) for s in found] == [(s.name, s.labels) for s in expected]
    assert all(a.value == b.value or math.isnan(a.value + b.value) for a, b in zip(found, expected, strict=True))


def test_what_is_not_ours_is_skipped_and_so_are_exemplars() -> None:
    text = '# HELP attendant_x y\nother_total 3\nattendant_x{model="a/1"} 2 # {id="r"} 1.0\nprocess_open_fds 5\n\nwhat?'
    assert parse(text) == {'attendant_x{model="a/1"}': 2, "process_open_fds": 5}
    assert loads(samples({"process_open_fds": 5.0, 'attendant_x{model="_unknown"}': 1.0})) == []


@pytest.fixture
def server():
    """A registry with one metric of each kind, and what a scrape of it says."""

    class Server:
        def __init__(self) -> None:
            self.registry = CollectorRegistry()
            self.started = Gauge("process_start_time_seconds", "when", registry=self.registry)
            self.count = Counter("attendant_calls", "how often", ["model"], registry=self.registry)
            self.time = Histogram("attendant_time_seconds", "how long", ["model"], registry=self.registry)
            self.level = Gauge("attendant_level", "how much", ["model"], registry=self.registry)

        def work(self, rng: random.Random) -> None:
            for _ in range(rng.randrange(20)):
                self.count.labels("a/1").inc(rng.random())
                self.time.labels("a/1").observe(rng.expovariate(1))
                self.level.labels("a/1").set(rng.random())

        def scrape(self) -> dict[str, float]:
            return parse(generate_latest(self.registry).decode())

    return Server


def test_between_two_scrapes_counts_are_of_that_time_and_gauges_of_its_end(server) -> None:
    rng = random.Random(3)
    first, alone = server(), server()
    first.work(rng)
    older, state = first.scrape(), rng.getstate()
    first.work(rng)
    rng.setstate(state)
    alone.work(rng)  # the same again, and nothing before it
    between = since(first.scrape(), older)
    assert between == pytest.approx(
        alone.scrape() | {'attendant_level{model="a/1"}': first.level.labels("a/1")._value.get()}
    )
    assert since(older, {"process_start_time_seconds": 0.0}) == older


def test_a_server_that_restarted_counts_from_zero(server) -> None:
    rng = random.Random(4)
    before, after = server(), server()
    before.work(rng)
    after.count.labels("a/1").inc(0.01)
    assert is_restarted(after.scrape(), before.scrape())  # a counter fell
    assert since(after.scrape(), before.scrape()) == after.scrape()
    assert not is_restarted(before.scrape(), {**after.scrape(), 'attendant_calls_total{model="a/1"}': 0.0})
    before.started.set(7)
    assert is_restarted(before.scrape(), after.scrape())  # it overtook what was there, but started at another time


def test_curves_are_what_the_latency_model_predicts_of_the_same_work() -> None:
    rng = random.Random(5)
    model = LatencyModel()
    make = {
        "encode": lambda n: encode_work(1, n),
        "prefill": lambda n: prefill_work(0, n),
        "decode": lambda n: decode_work([n]),
    }
    for phase, work in make.items():
        constant, linear, quadratic = (rng.uniform(1e-3, 1e-2), rng.uniform(1e-5, 1e-4), rng.uniform(1e-8, 1e-7))
        for _ in range(64):
            runs, tokens, attended = work(rng.randrange(1, 4000))
            seconds = constant + linear * tokens + quadratic * attended
            model.observe(phase, Work(runs, tokens, attended), seconds)
    laws = {phase: Law(*model.coefficients(phase)) for phase in make}
    for length in (1, 17, 512, 4000):
        predicted = {phase: model.predict(phase, work(length)) for phase, work in make.items()}
        decoder = {phase: laws[phase] for phase in ("prefill", "decode")}
        assert predicted_seconds("first token", length, decoder) == pytest.approx(predicted["prefill"])
        assert predicted_seconds("between tokens", length, decoder) == pytest.approx(predicted["decode"])
        assert predicted_seconds("request", length, decoder) is None
        encoder = {"encode": laws["encode"]}
        assert predicted_seconds("request", length, encoder) == pytest.approx(predicted["encode"])
        reads = predicted["encode"] + model.predict("decode", decode_work([1]))
        assert predicted_seconds("first token", length, laws) == pytest.approx(reads)  # of an encoder-decoder
    assert [predicted_seconds(latency, 8, {}) for latency in ("first token", "between tokens", "request")] == [None] * 3


def test_durations_have_three_digits_at_most_and_a_fitting_unit() -> None:
    shown = {
        0.0: "0 s",
        1.234e-8: "12.3 ns",
        9.996e-7: "1 us",
        9.3346e-4: "933 us",
        0.9996: "1 s",
        105.0: "105 s",
        610.0: "10.2 min",
        86400.0: "24 h",
        -0.2: "-200 ms",
        math.inf: "inf s",
    }
    assert {seconds: duration(seconds) for seconds in shown} == shown
