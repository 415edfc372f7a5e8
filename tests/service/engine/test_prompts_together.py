"""Prompts that are read in one run get what each gets alone, also where that run fails."""

import logging
import random

import pytest

from service.bundle import FoundBundle
from service.engine.engine import Engine
from service.engine.runtime import use_threads
from service.engine.step_graph import StepGraph
from service.scheduling.plan import Chunk, Sample, StepPlan
from service.scheduling.request import Request, SamplingParams

LENGTHS = (12, 30, 2)


@pytest.fixture(params=["fp32", "int8"])
def graph(request: pytest.FixtureRequest, tiny_bundles: dict[str, FoundBundle]) -> StepGraph:
    use_threads(2)
    return StepGraph(tiny_bundles[request.param], 6, 128)


def chunks(graph: StepGraph, first_slot: int) -> tuple[Chunk, ...]:
    """Whole prompts of a random, of a greedy and of a constrained request."""
    rng = random.Random(0)
    samplings = (SamplingParams(temperature=0.9, top_p=0.9, seed=1), SamplingParams(temperature=0.0), SamplingParams())
    found = []
    for slot, (length, sampling) in enumerate(zip(LENGTHS, samplings, strict=True), first_slot):
        prompt = tuple(rng.randrange(graph.vocab_size) for _ in range(length))
        request = Request(
            request_id=f"{length}",
            prompt=prompt,
            max_tokens=8,
            sampling=sampling,
            logprobs=True,
            top_logprobs=3,
            arrival=0.0,
        )
        found.append(Chunk(request.request_id, slot, 0, prompt, Sample(request, length, 0)))
    return tuple(found)


def test_together_is_as_alone_to_the_bit(graph: StepGraph) -> None:
    engine = Engine(graph)
    alone = engine.execute(StepPlan(chunks=chunks(graph, 0)))
    together = engine.execute(StepPlan(prompts=chunks(graph, 3)))
    assert not alone.failures and not together.failures
    assert [together.tokens[slot + 3] for slot in range(3)] == [alone.tokens[slot] for slot in range(3)]
    tokens = [alone.tokens[slot].token_id for slot in range(3)]
    first = graph.decode(tokens, [length + 1 for length in LENGTHS]).copy()
    assert (graph.decode(tokens, [length + 1 for length in LENGTHS], first_slot=3) == first).all()


def test_where_the_run_fails_they_are_read_one_by_one(
    graph: StepGraph, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(graph)
    expected = engine.execute(StepPlan(prompts=chunks(graph, 0)))

    def fails(first_slot: int, prompts: list[tuple[int, ...]]) -> None:
        raise RuntimeError("as ONNX Runtime might")

    monkeypatch.setattr(graph, "prompts", fails)
    with caplog.at_level(logging.ERROR):
        assert engine.execute(StepPlan(prompts=chunks(graph, 0))).tokens == expected.tokens
    assert "one by one" in caplog.text
