"""Every rule of what sequences remember, served: long and short sequences together, against PyTorch."""

import asyncio
import random
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from attendant.bundle import StateRule
from models.generate import greedy
from service.bundle import FoundBundle
from service.engine.step_graph import StepGraph
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import ExecutionFailed
from service.metrics import ServerMetrics
from service.scheduling.request import Beam, Finish, Request, SamplingParams, Token
from service.token_stream import TokenStream

RULES = ("append", "window", "ring", "replace")
CONSTANT = ("window", "ring", "replace")


def load(found: FoundBundle, **options: int) -> EngineLoop:
    sizes = {"num_slots": 6, "kv_memory": 16 << 20, "prefill_chunk_tokens": 16, "idle_chunk_tokens": 100}
    return EngineLoop.load(found, EngineOptions(**(sizes | options)), ServerMetrics().model(found.manifest.key, 8192))


@pytest.fixture(params=RULES)
async def engine_loop(
    request: pytest.FixtureRequest, byte_bundles: dict[str, FoundBundle]
) -> AsyncIterator[EngineLoop]:
    loop = load(byte_bundles[request.param])
    loop.start()
    yield loop
    await loop.close()


def make_request(name: str, prompt: int, max_tokens: int, **fields: object) -> Request:
    rng = random.Random(name)
    settings = {"sampling": SamplingParams(temperature=0.0), "logprobs": True, "top_logprobs": 3} | fields
    tokens = tuple(rng.randrange(1, 256) for _ in range(prompt))
    return Request(request_id=name, prompt=tokens, max_tokens=max_tokens, arrival=EngineLoop.clock(), **settings)


async def read(stream: TokenStream) -> tuple[list[Token], Finish | None]:
    tokens: list[Token] = []
    finish = None
    async for item in stream:
        tokens += item.tokens
        finish = item.finish
    return tokens, finish


def test_the_bundles_have_the_rules_that_they_are_named_after(byte_bundles: dict[str, FoundBundle]) -> None:
    rules = {name: {state.rule for state in found.manifest.states} for name, found in byte_bundles.items()}
    assert rules["append"] == rules["window"] == {StateRule.APPEND}
    assert rules["ring"] == {StateRule.RING} and rules["replace"] == {StateRule.REPLACE}
    assert {state.window for state in byte_bundles["window"].manifest.states} == {24}


async def test_sequences_of_all_lengths_together_get_what_pytorch_says(engine_loop, byte_decoders) -> None:
    decoder = byte_decoders[engine_loop.manifest.name].module
    requests = [make_request(f"of {length}", length, 12) for length in (1, 2, 17, 23, 24, 25, 128, 129, 300)]
    found = await asyncio.gather(*(read(engine_loop.submit(request)) for request in requests))
    for request, (tokens, _) in zip(requests, found, strict=True):
        assert [token.token_id for token in tokens] == greedy(decoder, request.prompt, 12), request.request_id


async def test_a_sequence_is_the_same_to_the_bit_alone_and_among_others(engine_loop) -> None:
    alone = await read(engine_loop.submit(make_request("it", 150, 40)))
    others = [make_request(f"other {length}", length, 30 + length % 7) for length in (1, 40, 90, 140, 200, 5, 260)]
    beams = make_request("search", 30, 20, beam=Beam(width=3), top_logprobs=6, eos_token_ids=frozenset({0}))
    streams = [engine_loop.submit(other) for other in others[:3]]
    again = engine_loop.submit(make_request("it", 150, 40))
    streams += [engine_loop.submit(other) for other in (*others[3:], beams)]
    tokens, *_ = await asyncio.gather(read(again), *map(read, streams))
    assert tokens[0] == alone[0]


async def test_a_sequence_that_was_poisoned_leaves_nothing_behind(engine_loop, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = await read(engine_loop.submit(make_request("healthy", 9, 30)))
    decode = StepGraph.decode

    def poisoning_decode(
        self: StepGraph, token_ids: list[int], lengths: list[int], real: list[int], first_slot: int
    ) -> object:
        for slot, length in enumerate(lengths, first_slot):
            if length == 70:  # the other one is never as long
                for pool in self.pools:
                    pool.array[slot] = np.nan
        return decode(self, token_ids, lengths, real, first_slot)

    monkeypatch.setattr(StepGraph, "decode", poisoning_decode)
    poisoned = engine_loop.submit(make_request("poisoned", 60, 100))
    neighbour = engine_loop.submit(make_request("healthy", 9, 30))
    with pytest.raises(ExecutionFailed, match="not finite"):
        await read(poisoned)
    assert (await read(neighbour))[0] == healthy[0]
    after = await asyncio.gather(
        *(read(engine_loop.submit(make_request(name, 9, 30))) for name in ("healthy", "a", "b"))
    )
    assert after[0][0] == healthy[0]


async def test_a_step_that_fails_for_others_is_repeated_without_a_trace(
    engine_loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = await read(engine_loop.submit(make_request("healthy", 9, 30)))
    keep, calls = StepGraph._keep, []

    def failing_keep(self: StepGraph, lengths: dict[int, int]) -> None:
        calls.append(1)
        if len(calls) % 3 == 0:  # the step ran, and then something went wrong
            raise RuntimeError
        keep(self, lengths)

    monkeypatch.setattr(StepGraph, "_keep", failing_keep)
    assert (await read(engine_loop.submit(make_request("healthy", 9, 30))))[0] == healthy[0]
    assert len(calls) >= 3


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("rule", RULES)
def test_memory_of_a_sequence_is_constant_but_where_everything_is_kept(
    byte_bundles: dict[str, FoundBundle], rule: str
) -> None:
    graph = StepGraph(byte_bundles[rule], 2, 8192)
    tokens = [token % 255 + 1 for token in range(8192 - 128)]
    graph.begin(1)
    for start in (0, 128):  # whatever is allocated once
        graph.chunk(1, tokens[start : start + 128], start)
    before = resident_bytes()
    for start in range(256, len(tokens), 128):
        graph.chunk(1, tokens[start : start + 128], start)
    grown = resident_bytes() - before
    kept = sum(pool.array[0].nbytes for pool in graph.pools if pool.spec.rule is StateRule.APPEND)
    if rule == "append":
        assert grown > 0.9 * kept > 3_000_000
    else:
        assert grown < 600_000


@pytest.mark.parametrize("rule", CONSTANT)
async def test_admission_counts_what_a_long_sequence_keeps_and_not_its_length(
    byte_bundles: dict[str, FoundBundle], rule: str
) -> None:
    """Four times 8,000 tokens in memory for the positions of two."""
    loop = load(byte_bundles[rule], num_slots=4, kv_memory=1 << 20)
    loop.start()
    assert loop.capacity == 8192
    streams = [loop.submit(make_request(str(number), 4, 8000)) for number in range(4)]
    for stream in streams:
        await anext(stream)
    assert loop.snapshot().num_running == 4
    await loop.close()
