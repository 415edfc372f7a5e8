"""From start to end: readiness, ports, draining, and what a wrong setting gets."""

import os
import signal
import subprocess
import sys
import urllib.error

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from attendant.v1 import generation_pb2 as pb

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SHORT = pb.TokenIds(ids=[5, 6])


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ATTENDANT_")}
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=clean | environment)


def test_every_model_is_announced_when_it_is_ready(server) -> None:
    assert server.lines[0].startswith("LISTENING 127.0.0.1: ")
    assert [line.rpartition(" in ")[0] for line in server.lines[1:]] == [
        "READY tiny-fp32/1 (fp32)",
        "READY tiny-int8/1 (int8)",
    ]


def test_health_knows_the_server_each_service_and_each_model(server) -> None:
    for name in ("", "liveness", "readiness", "startup", "attendant.v1.InferenceService", "attendant.v1.ModelService"):
        assert server.status_of(name) == "SERVING", name
    for name in ("model/tiny-fp32", "model/tiny-fp32/1", "model/tiny-int8"):
        assert server.status_of(name) == "SERVING", name
    with pytest.raises(grpc.RpcError) as error:
        server.status_of("model/nobody")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert server.get("/healthz") == server.get("/readyz") == "ok\n"


def test_a_request_before_the_model_is_loaded_is_told_so(start, refusal_of) -> None:
    server = start()
    try:
        list(server.generate("tiny-int8"))
    except grpc.RpcError:  # it loads second, so nearly always there is time to ask too early
        refusal = refusal_of(lambda: list(server.generate("tiny-int8")))
        if refusal.reason:
            assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "MODEL_UNAVAILABLE")
            assert refusal.metadata["state"] == "loading"
    server.wait_ready()
    assert list(server.generate("tiny-int8"))


def test_reflection_lists_the_services_unless_it_is_off(server, start) -> None:
    def services(channel: grpc.Channel) -> set[str]:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]))
        return {service.name for service in response.list_services_response.service}

    assert services(server.channel) == {
        "attendant.v1.InferenceService",
        "attendant.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    with pytest.raises(grpc.RpcError) as error:
        services(start("--no-reflection").channel)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_second_server_on_a_port_fails_at_once(server, tiny_repository) -> None:
    for ports, flag in (
        (("--port", str(server.port), "--metrics-port", "0"), "--port"),
        (("--port", "0", "--metrics-port", str(server.metrics_port)), "--metrics-port"),
    ):
        second = run("--repository", str(tiny_repository), "--host", "127.0.0.1", *ports)
        assert second.returncode == 1
        assert f"({flag})" in second.stderr
        assert "READY" not in second.stdout
    assert list(server.generate()), "the first is not disturbed"


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "words"),
    [
        (("--max-num-seq", "3"), {}, 2, "did you mean --max-num-seqs"),
        ((), {"ATTENDANT_REPOSITORI": "x"}, 2, "did you mean ATTENDANT_REPOSITORY"),
        ((), {"ATTENDANT_PORT": "tcp://10.0.0.7:8001"}, 2, "enableServiceLinks"),
        (("--provider", "cuda"), {}, 1, "can be served"),
        (("--repository", "nowhere"), {}, 1, "not a directory"),
        (("--models", "nobody"), {}, 1, "tiny-fp32/1"),
    ],
)
def test_a_server_that_cannot_start_says_why_and_leaves(
    tiny_repository, arguments: tuple[str, ...], environment: dict[str, str], status: int, words: str
) -> None:
    ports = ("--port", "0") if "ATTENDANT_PORT" not in environment else ()
    ended = run("--repository", str(tiny_repository), "--metrics-port", "0", *ports, *arguments, **environment)
    assert ended.returncode == status
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_on_sigterm_running_requests_finish_and_watchers_learn_of_it(start) -> None:
    server = start("--models", "tiny-fp32", "--drain-delay-seconds", "1").wait_ready()
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service="model/tiny-fp32"))
    assert next(watch).status == SERVING
    calls = [server.long_answer(280, token_ids=SHORT) for _ in range(4)]
    assert all(next(call).WhichOneof("event") == "started" for call in calls)
    server.signal()
    assert next(watch).status == NOT_SERVING
    assert server.status_of("readiness") == "NOT_SERVING"
    assert server.status_of("liveness") == "SERVING", "a draining server must not be restarted"
    with pytest.raises(urllib.error.HTTPError) as unready:
        server.get("/readyz")
    unready.value.close()
    assert server.get("/healthz") == "ok\n"
    late = server.long_answer(280, token_ids=SHORT)
    assert next(late).WhichOneof("event") == "started", "word of it takes a while to spread; until then it serves"
    assert not list(watch), "the watch ends, so that it does not hold up the server"
    for call in (*calls, late):
        assert list(call)[-1].finished.usage.output_tokens == 280
    assert server.wait() == 0
    with pytest.raises(grpc.RpcError) as refused:
        list(server.generate(timeout=5))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_requests_that_outlast_the_drain_end_with_a_reason(start, refusal_of) -> None:
    server = start("--models", "tiny-fp32", "--drain-seconds", "0").wait_ready()
    calls = [server.long_answer(280, token_ids=SHORT) for _ in range(24)]
    assert all(next(call).WhichOneof("event") == "started" for call in calls)
    server.signal()
    refusal = refusal_of(lambda: [list(call) for call in calls])
    assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_the_draining(start) -> None:
    server = start("--models", "tiny-fp32", "--drain-delay-seconds", "600").wait_ready()
    watch = server.health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert next(watch).status == SERVING
    server.signal(signal.SIGINT)
    assert next(watch).status == NOT_SERVING
    server.signal(signal.SIGTERM)
    assert server.wait() == 0


def test_a_signal_while_loading_ends_the_server(start) -> None:
    server = start()
    server.signal()
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_a_server_leaves_nothing_in_the_home_directory(start, monkeypatch, tmp_path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    start("--models", "tiny-fp32").wait_ready()
    assert not list(home.rglob("*")), "ONNX Runtime keeps an identifier there where it may report its use"
