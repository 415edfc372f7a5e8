"""What is measured is exported under bounded labels, with the objectives as exact bounds, and few series."""

import itertools
import math
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import MetricsEndpoint, ServerMetrics, buckets
from service.metrics.model import ENDS, PHASES, TERMS
from service.metrics.reference import page
from service.scheduling.latency import LatencyModel
from service.scheduling.work import decode_work

MODEL = "smollm2-135m/1"


def scrape(endpoint: MetricsEndpoint) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=5) as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(response.read().decode())
        return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, sample: str, **labels: str) -> float:
    found = [s.value for s in families[name].samples if s.name == sample and labels.items() <= s.labels.items()]
    assert len(found) == 1, (sample, labels, found)
    return found[0]


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics()


@pytest.fixture
def endpoint(metrics: ServerMetrics) -> Iterator[MetricsEndpoint]:
    endpoint = MetricsEndpoint(metrics, host="127.0.0.1", port=0, alive=lambda: True, ready=lambda: False)
    yield endpoint
    endpoint.close()


def test_a_scrape_over_http_shows_what_happened(metrics: ServerMetrics, endpoint: MetricsEndpoint) -> None:
    model = metrics.model(MODEL, longest=8192)
    model.loaded(1.5, sha256="ab" * 32, family="decoder", precision="int8", target="cpu")
    model.queued(300, 0.02)
    model.prefilled(300, 0.2, cached_tokens=100)
    model.first_token(300, 0.25)
    for context in (510, 511, 512, 513):
        model.inter_token(context, 0.011)
    model.generated(5)
    model.step("decode", rows=3, real_tokens=3, padding_tokens=1, seconds=0.01)
    model.queue(waiting=2, running=3, tokens=700, predicted_seconds=1.5)
    model.memory_is(1000, block_tokens=16, num_slots=4)
    model.memory(reserved=250, committed=400)
    model.succeeded("length", prompt_tokens=300, output_tokens=5, seconds=0.3, first_token_seconds=0.26)
    metrics.answered(MODEL, "generate", "OK")
    metrics.answered(None, "generate", "NOT_FOUND")

    families = scrape(endpoint)
    prefix = "attendant_"
    for name, bucket, count in (
        ("time_to_first_token_seconds", "512", 1),
        ("request_queue_seconds", "512", 1),
        ("request_prefill_seconds", "512", 1),
        ("request_duration_seconds", "512", 1),
        ("time_per_output_token_seconds", "512", 1),
        ("inter_token_latency_seconds", "512", 3),
        ("inter_token_latency_seconds", "1024", 1),
    ):
        sample = f"{prefix}{name}_count"
        assert value(families, prefix + name, sample, model=MODEL, seq_bucket=bucket) == count, name
    tokens = {
        kind: value(families, "attendant_tokens", "attendant_tokens_total", kind=kind)
        for kind in ("prompt", "prompt_cached", "output")
    }
    assert tokens == {"prompt": 200, "prompt_cached": 100, "output": 5}
    assert value(families, "attendant_kv_cache_usage_ratio", "attendant_kv_cache_usage_ratio") == 0.25
    assert value(families, "attendant_kv_cache_tokens", "attendant_kv_cache_tokens", state="free") == 600
    assert value(families, "attendant_kv_cache_tokens", "attendant_kv_cache_tokens", state="cached") == 150
    padding = {"phase": "decode", "kind": "padding"}
    assert value(families, "attendant_batch_tokens", "attendant_batch_tokens_total", **padding) == 1
    assert value(families, "attendant_predicted_queue_seconds", "attendant_predicted_queue_seconds") == 1.5
    assert value(families, "attendant_model_ready", "attendant_model_ready", model=MODEL) == 1
    requests = "attendant_requests_total"
    assert value(families, "attendant_requests", requests, model="_unknown", code="NOT_FOUND") == 1
    assert value(families, "attendant_requests", requests, model=MODEL, code="OK") == 1


def test_objectives_are_exact_bounds_and_times_at_most_double(metrics: ServerMetrics) -> None:
    objectives = {
        "attendant_time_to_first_token_seconds": 0.5,
        "attendant_inter_token_latency_seconds": 0.05,
        "attendant_request_duration_seconds": 10.0,
    }
    by_name = {family.name: family.bounds for family in metrics.families}
    assert 0.05 in by_name["attendant_time_per_output_token_seconds"]
    for name, objective in objectives.items():
        bounds = by_name[name]
        assert bounds[0] == 1e-4
        assert objective in bounds
        assert all(low < high <= 2.0000001 * low for low, high in itertools.pairwise(bounds))
    assert len(buckets.COARSE_SECONDS) == 12


def test_every_series_of_a_model_exists_before_anything_happens(
    metrics: ServerMetrics, endpoint: MetricsEndpoint
) -> None:
    metrics.model(MODEL, longest=8192)
    families = scrape(endpoint)
    for end in ENDS["generate"]:
        assert value(families, "attendant_requests_finished", "attendant_requests_finished_total", reason=end) == 0
    for phase in PHASES["generate"]:
        assert value(families, "attendant_batch_size", "attendant_batch_size_count", phase=phase) == 0
    labels = {s.labels["seq_bucket"] for s in families["attendant_time_to_first_token_seconds"].samples}
    assert labels == {"64", "128", "256", "512", "1024", "2048", "4096", "+Inf"}


def test_lengths_that_a_model_cannot_have_get_no_bucket(metrics: ServerMetrics) -> None:
    assert buckets.SeqBuckets((64, 128, 256), longest=256).labels == ("64", "128", "+Inf")
    assert buckets.SeqBuckets((64, 128, 256), longest=257).labels == ("64", "128", "256", "+Inf")


def test_the_number_of_series_does_not_depend_on_traffic(metrics: ServerMetrics, endpoint: MetricsEndpoint) -> None:
    model = metrics.model(MODEL, longest=1_000_000)
    model.loaded(1.0, sha256="00" * 32, family="decoder", precision="fp32", target="cpu")
    model.memory_is(1000, block_tokens=16, num_slots=4)

    def num_series() -> int:
        return sum(len(family.samples) for family in scrape(endpoint).values())

    before = num_series()
    random_numbers = random.Random(1)
    for _ in range(2000):
        length = random_numbers.randrange(1, 1_000_000)
        seconds = random_numbers.expovariate(1.0)
        model.queued(length, seconds)
        model.prefilled(length, seconds)
        model.first_token(length, seconds)
        model.inter_token(length, seconds, f"{length}")
        model.generated(2)
        model.step(random_numbers.choice(PHASES["generate"]), 3, length, 0, seconds)
        model.queue(1, 2, length, seconds)
        model.memory(3, 4)
        model.succeeded("eos", length, length, seconds, first_token_seconds=0.0, request_id="a" * length)
        model.failed("cancelled")
        metrics.answered(MODEL, "generate", "OK")
        metrics.turned_away(MODEL, "queue_full")
    assert num_series() == before < 1500


def test_what_was_learned_of_latency_shows_as_it_is_when_somebody_looks(
    metrics: ServerMetrics, endpoint: MetricsEndpoint
) -> None:
    latency = LatencyModel()
    metrics.model(MODEL, longest=8192).latency(latency)

    def shown(name: str, **labels: str) -> float:
        full = f"attendant_latency_model_{name}"
        return value(scrape(endpoint), full, full, phase="decode", **labels)

    assert math.isnan(shown("error_ratio"))
    assert all(math.isnan(shown("coefficient", term=term)) for term in TERMS)
    assert shown("observations") == 0
    for rows in range(1, 31):
        latency.observe("decode", decode_work([100 * (rows % 7 + 1)] * rows), 0.01 + 0.002 * rows)
    assert shown("observations") == 30
    assert shown("coefficient", term="constant") == pytest.approx(0.01, rel=0.01)
    assert shown("coefficient", term="linear") == pytest.approx(0.002, rel=0.01)
    assert shown("coefficient", term="quadratic") < 1e-7
    assert shown("error_ratio") < 0.05


def test_no_series_says_when_it_was_created(metrics: ServerMetrics, endpoint: MetricsEndpoint) -> None:
    metrics.model(MODEL, longest=8192)
    samples = [s.name for family in scrape(endpoint).values() for s in family.samples]
    assert not [name for name in samples if name.endswith("_created")]


def test_probes_answer_over_http(endpoint: MetricsEndpoint) -> None:
    base = f"http://127.0.0.1:{endpoint.port}"
    with urllib.request.urlopen(f"{base}/healthz", timeout=5) as response:
        assert response.status == 200
    for path, status in (("/readyz", 503), ("/elsewhere", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(base + path, timeout=5)
        assert refused.value.code == status
        refused.value.close()


def test_a_second_endpoint_on_the_same_port_fails_at_once(metrics: ServerMetrics, endpoint: MetricsEndpoint) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsEndpoint(metrics, host="127.0.0.1", port=endpoint.port, alive=lambda: True, ready=lambda: True)


def test_the_page_for_people_is_what_the_code_says(metrics: ServerMetrics, endpoint: MetricsEndpoint) -> None:
    committed = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text("utf-8")
    assert committed == page(), "docs/metrics.md is not what `make docs` writes"
    metrics.model(MODEL, longest=8192)
    for family in scrape(endpoint).values():
        suffix = "_total" if family.type == "counter" else ""
        assert f"`{family.name}{suffix}`" in committed or family.name.startswith(("process_", "python_")), family.name


def test_what_is_one_unit_ends_in_it_and_says_so(metrics: ServerMetrics) -> None:
    for family in metrics.families:
        assert family.meaning.endswith("."), family
        assert not family.unit or family.name.removesuffix("_total").endswith("_" + family.unit), family
        assert (family.kind == "counter") == family.name.endswith("_total"), family
