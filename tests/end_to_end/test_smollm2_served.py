"""The real model behind the real server."""

import time
from pathlib import Path

import pytest

from attendant.v1 import generation_pb2 as pb

pytestmark = pytest.mark.smollm2

MODEL = "smollm2-135m"


@pytest.fixture
def smollm2(start, smollm2_repository: Path):
    return start(
        "--models", MODEL, "--kv-memory", "2GiB", "--idle-release-seconds", "5", repository=smollm2_repository
    ).wait_ready()


def text_of(events: list[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


def test_a_language_model_answers(smollm2) -> None:
    greedy = pb.SamplingParams(temperature=0, max_tokens=24)
    assert "Paris" in text_of(list(smollm2.generate(MODEL, prompt="The capital of France is", sampling=greedy)))
    question = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")])
    events = list(smollm2.generate(MODEL, messages=question, sampling=greedy))
    assert "Paris" in text_of(events)
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_EOS


def test_a_client_that_hangs_up_is_forgotten_within_a_few_steps(smollm2, eventually) -> None:
    call = smollm2.long_answer(4000, MODEL)
    assert next(call).WhichOneof("event") == "started"
    assert next(call).WhichOneof("event") == "delta"
    cancelled = time.monotonic()
    call.cancel()
    eventually(lambda: smollm2.value("attendant_requests_finished_total", reason="cancelled") == 1)
    eventually(lambda: smollm2.value("attendant_requests_running") == 0)
    assert time.monotonic() - cancelled < 10
    assert smollm2.value("attendant_tokens_total", kind="output") < 2000


def test_a_text_of_256_kib_does_not_hold_up_running_streams(smollm2, refusal_of) -> None:
    call = smollm2.long_answer(100, MODEL)
    assert next(call).WhichOneof("event") == "started"
    refusal = refusal_of(lambda: list(smollm2.generate(MODEL, prompt="word " * 50_000)))
    assert refusal.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert list(call)[-1].finished.usage.output_tokens == 100


@pytest.mark.slow  # the server gives memory back after half a minute without work
def test_memory_returns_to_its_level_after_load(smollm2, eventually) -> None:
    """Keys and values of a token are 45 KiB here: 8 sequences of 500 tokens hold 175 MiB while they run."""
    mebibyte = 2**20

    def load() -> int:
        calls = [smollm2.long_answer(50, MODEL, token_ids=pb.TokenIds(ids=[905 + row] * 450)) for row in range(8)]
        for call in calls[:6]:
            assert list(call)[-1].finished.usage.output_tokens == 50
        for call in calls[6:]:
            call.cancel()
        return smollm2.resident_bytes

    level = smollm2.resident_bytes
    for _ in range(2):
        assert load() > level + 150 * mebibyte
        eventually(
            lambda: smollm2.value("attendant_requests_running") == 0 and smollm2.resident_bytes < level + 80 * mebibyte
        )
