"""What a length costs is learned from traffic and shows on /metrics."""

import math

from attendant.client import Client
from attendant.v1 import generation_pb2 as pb

LONG = " ".join(["attention"] * 40)


def learned(server, model: str, phase: str) -> tuple[list[float], float, float]:
    """Return coefficients, error and observations as a scrape shows them."""
    labels = {"model": model, "phase": phase}
    name = "attendant_latency_model_"
    terms = [server.value(f"{name}coefficient", term=term, **labels) for term in ("constant", "linear", "quadratic")]
    return terms, server.value(f"{name}error_ratio", **labels), server.value(f"{name}observations", **labels)


def is_learned(coefficients: list[float], error: float) -> bool:
    return (
        all(math.isfinite(c) and c >= 0 for c in coefficients)
        and sum(coefficients) > 0
        and math.isfinite(error)
        and error >= 0
    )


def test_generation_teaches_what_reading_and_writing_cost(start, eventually) -> None:
    server = start("--models", "tiny-fp32").wait_ready()
    profile = {phase: learned(server, "tiny-fp32/1", phase) for phase in ("prefill", "decode")}
    assert all(observations > 0 for _, _, observations in profile.values()), "the checks at load are a first profile"
    assert all(map(math.isnan, learned(server, "tiny-fp32/1", "encode")[0])), "it reads no sources"
    for length in range(4, 24):  # of other tokens each, so that none has anything to reuse
        list(server.long_answer(10, token_ids=pb.TokenIds(ids=[length] * length)))
    eventually(lambda: server.value("attendant_requests_running") == 0)
    for phase, (_, _, before) in profile.items():
        coefficients, error, observations = learned(server, "tiny-fp32/1", phase)
        steps = server.value("attendant_step_seconds_count", model="tiny-fp32/1", phase=phase)
        assert observations - before == steps >= 20
        assert is_learned(coefficients, error), (phase, coefficients, error)


def test_encoding_teaches_what_a_text_costs(start, encoder_repository, eventually) -> None:
    server = start("--models", "encoder-fp32", repository=encoder_repository).wait_ready()
    before = learned(server, "encoder-fp32/1", "encode")[2]
    with Client(f"127.0.0.1:{server.port}") as client:
        for words in range(1, 21):
            client.embed(" ".join(LONG.split()[:words]), model="encoder-fp32")
    eventually(lambda: learned(server, "encoder-fp32/1", "encode")[2] == before + 20)
    coefficients, error, _ = learned(server, "encoder-fp32/1", "encode")
    assert is_learned(coefficients, error), (coefficients, error)


def test_a_restart_remembers_what_was_learned(start, tmp_path) -> None:
    state = ("--models", "tiny-fp32", "--state-dir", str(tmp_path / "state"))
    first = start(*state).wait_ready()
    list(first.long_answer(50))
    *_, known = learned(first, "tiny-fp32/1", "decode")
    first.signal()
    assert first.wait() == 0
    second = start(*state).wait_ready()
    coefficients, error, observations = learned(second, "tiny-fp32/1", "decode")
    assert observations == known > 49
    assert all(map(math.isfinite, coefficients))
    assert math.isnan(error), "nothing was predicted yet"
    assert "learns anew" not in second.log.read_text()
