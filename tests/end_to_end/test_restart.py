"""A model whose engine breaks while it is served: what clients and probes see, and what other models do not."""

import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import model_service_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def describe(server, model: str) -> model_service_pb2.Model:
    return server.models.GetModel(model_service_pb2.GetModelRequest(model=model)).model


def test_a_broken_model_stops_serving_and_recovers_while_another_streams_on(start, weak_bundles, refusal_of) -> None:
    server = start("--restart-delay-seconds", "0.5", "--restart-tries", "60", repository=weak_bundles.repository)
    server.wait_ready()
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service="model/weak"))
    assert next(watch).status == SERVING
    before = list(server.generate("weak", sampling=pb.SamplingParams(temperature=0.0)))[-1].finished.usage
    assert server.value("attendant_model_restarts_total", model="weak/1") == 0

    expected = [message.delta.token_ids for message in server.long_answer(250, "tiny-int8")]
    mended = threading.Event()
    answers: list[list[list[int]]] = []

    def stream_on() -> None:
        while not mended.is_set():
            answers.append([message.delta.token_ids for message in server.long_answer(250, "tiny-int8")])

    streaming = threading.Thread(target=stream_on)
    streaming.start()
    try:
        running = server.long_answer(250, "weak")
        assert next(running).WhichOneof("event") == "started"
        weak_bundles.spoil("weak")
        refusal = refusal_of(lambda: (list(running), list(server.generate("weak"))))
        assert (refusal.code.name, refusal.reason) in (
            ("UNAVAILABLE", "MODEL_UNAVAILABLE"),
            ("INTERNAL", "EXECUTION_FAILED"),  # of a step that was half done
        )
        assert next(watch).status == NOT_SERVING
        refusal = refusal_of(lambda: list(server.generate("weak")))
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "MODEL_UNAVAILABLE")
        assert refusal.retry_seconds > 0
        model = describe(server, "weak")
        assert model.state == model_service_pb2.MODEL_STATE_LOADING
        assert "failed while it was served" in model.reason
        assert server.value("attendant_model_ready", model="weak/1") == 0
        assert server.status_of("model/tiny-int8") == server.status_of("readiness") == "SERVING"
        assert server.status_of("liveness") == "SERVING", "a restart of the process would end the others too"
        weak_bundles.mend("weak")
        assert next(watch).status == SERVING
    finally:
        mended.set()
        streaming.join()
    assert len(answers) > 0
    flat = [token for delta in expected for token in delta]
    for answer in answers:
        assert [token for delta in answer for token in delta] == flat, "not a token is missing or other"
    after = list(server.generate("weak", sampling=pb.SamplingParams(temperature=0.0)))[-1].finished.usage
    assert (after.prompt_tokens, after.output_tokens) == (before.prompt_tokens, before.output_tokens)
    assert describe(server, "weak").state == model_service_pb2.MODEL_STATE_READY
    assert server.value("attendant_model_restarts_total", model="weak/1", result="succeeded") == 1
    assert server.value("attendant_requests_finished_total", model="tiny-int8/1", reason="error") == 0
    watch.cancel()


def test_a_model_that_stays_broken_is_given_up_and_the_others_are_served(start, weak_bundles, eventually) -> None:
    server = start("--restart-delay-seconds", "0.1", "--restart-tries", "2", repository=weak_bundles.repository)
    server.wait_ready()
    weak_bundles.spoil("weak")
    with pytest.raises(grpc.RpcError):
        list(server.generate("weak"))
    eventually(lambda: describe(server, "weak").state == model_service_pb2.MODEL_STATE_UNAVAILABLE)
    assert "SHA-256" in describe(server, "weak").reason
    assert server.status_of("model/weak") == "NOT_SERVING"
    assert server.status_of("liveness") == server.status_of("readiness") == "SERVING"
    assert any(line.startswith("FAILED weak/1: ") for line in server.lines)
    assert server.value("attendant_model_restarts_total", model="weak/1", result="failed") == 2
    assert list(server.generate("tiny-int8"))
