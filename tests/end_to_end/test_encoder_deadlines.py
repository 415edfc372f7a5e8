"""Deadlines and priorities of encoders, through a real server that has learned what its texts cost."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from attendant import Client, DeadlineExceeded
from attendant.v1 import embedding_pb2 as pb
from attendant.v1 import generation_pb2

MODEL = {"model": "encoder-fp32/1"}
LONG = pb.EmbedInput(token_ids=generation_pb2.TokenIds(ids=[5] * 288))
SHORT = pb.EmbedInput(token_ids=generation_pb2.TokenIds(ids=[5] * 8))


@pytest.fixture(scope="module")
def server(module_start, encoder_repository):
    """A server whose latency model is trusted."""
    server = module_start("--models", "encoder-fp32", repository=encoder_repository).wait_ready()
    for number in range(100):
        ids = generation_pb2.TokenIds(ids=[5] * (1 + 37 * number % 288))
        embed(server, pb.EmbedInput(token_ids=ids)).result()
    return server


def embed(server, *inputs: pb.EmbedInput, budget: float | None = None, **fields: object) -> grpc.Future:
    request = pb.EmbedRequest(model="encoder-fp32", inputs=inputs, **fields)
    if budget is not None:
        request.latency_budget.FromNanoseconds(round(budget * 1e9))
    return server.inference.Embed.future(request, timeout=600)


@pytest.fixture
def backlog(server, eventually):
    """Calls that take a while, long enough for another to come meanwhile."""
    calls = [embed(server, *[LONG] * 256) for _ in range(16)]
    eventually(lambda: server.value("attendant_requests_waiting", **MODEL) >= 8)
    yield calls
    for call in calls:
        call.cancel()
    eventually(lambda: server.value("attendant_requests_waiting", **MODEL) == 0)


def test_what_cannot_be_in_time_is_refused_at_arrival_with_the_prediction(server, backlog, refusal_of):
    refused = server.value("attendant_requests_rejected_total", reason="deadline_unreachable", **MODEL)
    refusal = refusal_of(embed(server, SHORT, budget=0.02, priority=-1).result)
    assert not all(call.done() for call in backlog)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refusal.reason == "DEADLINE_UNREACHABLE"
    assert float(refusal.metadata["predicted_seconds"]) > float(refusal.metadata["budget_seconds"]) == 0.02
    assert int(refusal.metadata["waiting"]) + int(refusal.metadata["running"]) > 0
    now = server.value("attendant_requests_rejected_total", reason="deadline_unreachable", **MODEL)
    assert now == refused + 1


def test_what_waits_until_it_cannot_be_in_time_any_more_is_refused_too(server, backlog, refusal_of):
    first = refusal_of(embed(server, *[LONG] * 256, budget=0.02, priority=-1).result)
    seconds = float(first.metadata["predicted_seconds"])
    refused = server.value("attendant_deadline_requests_total", outcome="refused", **MODEL)
    missed = server.value("attendant_deadline_requests_total", outcome="missed", **MODEL)
    call = embed(server, *[LONG] * 256, budget=1.2 * seconds, priority=-1)
    others = [embed(server, *[LONG] * 256) for _ in range(16)]  # which go first
    refusal = refusal_of(call.result)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_UNREACHABLE")
    for other in others:
        other.cancel()
    assert server.value("attendant_deadline_requests_total", outcome="refused", **MODEL) == refused + 1
    assert server.value("attendant_deadline_requests_total", outcome="missed", **MODEL) == missed


def test_a_deadline_or_a_priority_goes_before_calls_that_came_earlier(server, backlog):
    assert embed(server, SHORT, budget=20).result().embeddings
    assert embed(server, SHORT, priority=3).result().embeddings
    assert not all(call.done() for call in backlog), "all of them came first"


def test_a_server_with_nothing_to_do_tries_even_what_it_thinks_hopeless(server, eventually, refusal_of):
    # A batch whose callers have hung up goes on, and nobody runs in it: what comes behind it finds it over.
    assert embed(server, SHORT).result().embeddings
    eventually(lambda: server.value("attendant_requests_running", **MODEL) == 0)
    before = server.value("attendant_requests_finished_total", reason="deadline", **MODEL)
    refusal = refusal_of(embed(server, *[LONG] * 256, budget=0.03).result)
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refusal.reason == "DEADLINE_EXCEEDED"
    assert refusal.metadata["phase"] in ("waiting", "encode")
    assert server.value("attendant_requests_finished_total", reason="deadline", **MODEL) == before + 1


def test_a_call_that_is_in_time_keeps_its_budget(server):
    assert embed(server, SHORT, budget=30).result().embeddings[0].tokens == 8


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"latency_budget": Duration()}, "latency_budget"),
        ({"latency_budget": Duration(seconds=-1)}, "latency_budget"),
        ({"latency_budget": Duration(seconds=86_401)}, "latency_budget"),
    ],
)
def test_fields_out_of_range_are_named(server, refusal_of, fields, field):
    refusal = refusal_of(embed(server, SHORT, **fields).result)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


def test_the_client_says_it_in_seconds(server, backlog):
    with Client(f"127.0.0.1:{server.port}") as client:
        assert len(client.embed("a", model="encoder-fp32", latency_budget=20, priority=1)) == 1
        with pytest.raises(DeadlineExceeded, match="it would take"):
            client.embed("a", model="encoder-fp32", latency_budget=0.02, priority=-1)
