"""The engine loop with real ONNX Runtime on small exported decoders: what a caller gets, whatever else happens."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from service.bundle import FoundBundle
from service.engine.step_graph import StepGraph
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import ContextLengthExceeded, Draining, ExecutionFailed, QueueFull
from service.metrics import ServerMetrics
from service.scheduling.invariants import violations
from service.scheduling.request import Finish, FinishReason, Request, SamplingParams, Token
from service.token_stream import TokenStream

OPTIONS = EngineOptions(
    num_slots=8, max_waiting_requests=64, kv_memory=8 << 20, prefill_chunk_tokens=16, idle_chunk_tokens=32
)


def load(found: FoundBundle, options: EngineOptions = OPTIONS) -> EngineLoop:
    metrics = ServerMetrics().model(found.manifest.key, found.manifest.limits.max_model_len)
    return EngineLoop.load(found, options, metrics)


@pytest.fixture(params=["fp32", "int8"])
async def engine_loop(
    request: pytest.FixtureRequest, tiny_bundles: dict[str, FoundBundle]
) -> AsyncIterator[EngineLoop]:
    loop = load(tiny_bundles[request.param])
    loop.start()
    yield loop
    await loop.close()


def make_request(loop: EngineLoop, name: str, prompt: int, max_tokens: int, **sampling: object) -> Request:
    rng = random.Random(name)
    vocab = loop.manifest.vocabulary.size
    return Request(
        request_id=name,
        prompt=tuple(rng.randrange(vocab) for _ in range(prompt)),
        max_tokens=max_tokens,
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        logprobs=True,
        top_logprobs=3,
        arrival=loop.clock(),
    )


async def read(stream: TokenStream) -> tuple[list[Token], Finish | None]:
    tokens: list[Token] = []
    finish = None
    async for item in stream:
        assert finish is None, "an item after the last"
        tokens += item.tokens
        finish = item.finish
    return tokens, finish


def mixed_requests(loop: EngineLoop, seed: int, number: int) -> list[Request]:
    """Requests of many lengths, greedy and sampled."""
    rng = random.Random(seed)
    requests = []
    for index in range(number):
        prompt = rng.randint(1, loop.capacity - 12)
        sampling = {} if rng.random() < 0.5 else {"temperature": 0.9, "top_p": 0.9, "seed": index}
        requests.append(make_request(loop, f"{seed}-{index}", prompt, rng.randint(1, 12), **sampling))
    return requests


async def test_tokens_and_logprobs_are_the_same_bits_alone_and_among_neighbours(engine_loop: EngineLoop) -> None:
    requests = mixed_requests(engine_loop, seed=1, number=40)
    alone = [await read(engine_loop.submit(request)) for request in requests]

    async def delayed(request: Request, delay: int) -> tuple[list[Token], Finish | None]:
        for _ in range(delay):
            await asyncio.sleep(0)
        return await read(engine_loop.submit(request))

    rng = random.Random(2)
    together = await asyncio.gather(*(delayed(request, rng.randint(0, 300)) for request in requests))
    for request, (tokens, finish), (tokens_together, finish_together) in zip(requests, alone, together, strict=True):
        assert tokens == tokens_together, request.request_id
        assert finish is not None
        assert finish_together is not None
        assert finish.reason is finish_together.reason is FinishReason.LENGTH
        assert len(tokens) == request.max_tokens


@pytest.mark.parametrize("chunk_tokens", [4, 5, 7, 19, 64])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
async def test_the_size_of_prefill_chunks_changes_no_bit(
    chunk_tokens: int, precision: str, tiny_bundles: dict[str, FoundBundle]
) -> None:
    results = []
    for size in (64, chunk_tokens):
        options = EngineOptions(
            num_slots=3, kv_memory=8 << 20, prefill_chunk_tokens=size, idle_chunk_tokens=size, threads=2
        )
        loop = load(tiny_bundles[precision], options)
        loop.start()
        requests = mixed_requests(loop, seed=5, number=10)
        results.append(await asyncio.gather(*(read(loop.submit(request)) for request in requests)))
        await loop.close()
    assert [tokens for tokens, _ in results[0]] == [tokens for tokens, _ in results[1]]


async def test_a_thousand_requests_with_cancellations_each_end_once_and_leak_nothing(
    tiny_bundles: dict[str, FoundBundle],
) -> None:
    loop = load(tiny_bundles["int8"])
    scheduler = loop._scheduler
    for name in ("add", "cancel", "schedule", "update"):
        _check_after(scheduler, name)
    loop.start()
    rng = random.Random(3)
    ends: dict[str, list[str]] = {}

    async def caller(index: int) -> None:
        prompt = rng.randint(1, loop.capacity - 20)
        request = make_request(loop, str(index), prompt, rng.randint(1, 20))
        cancel_after = rng.randint(0, 12) if rng.random() < 0.3 else None
        stream = loop.submit(request)
        seen = 0
        if cancel_after == 0:
            stream.cancel()
        async for item in stream:
            seen += len(item.tokens)
            if item.finish is not None:
                ends.setdefault(request.request_id, []).append("finished")
            elif cancel_after is not None and seen >= cancel_after:
                stream.cancel()
        if request.request_id not in ends:
            ends.setdefault(request.request_id, []).append("cancelled")

    waiting = iter(range(1000))

    async def worker() -> None:
        for index in waiting:
            await caller(index)

    await asyncio.gather(*(worker() for _ in range(40)))
    assert await loop.drain(30)
    await loop.close()
    assert len(ends) == 1000
    assert all(len(each) == 1 for each in ends.values())
    assert 150 < sum(each == ["cancelled"] for each in ends.values()) < 400
    snapshot = loop.snapshot()
    assert (snapshot.reserved, snapshot.sequences) == (0, ())
    assert snapshot.free_slots == set(range(OPTIONS.num_slots))
    assert loop._streams == {}


def _check_after(scheduler: object, name: str) -> None:
    """Look for violations after every call of a method of the scheduler."""
    method = getattr(scheduler, name)

    def checked(*arguments: object) -> object:
        result = method(*arguments)
        assert violations(scheduler.snapshot()) == []
        return result

    setattr(scheduler, name, checked)


async def test_a_cancelled_request_frees_its_slot_before_the_next_one_runs(
    tiny_bundles: dict[str, FoundBundle],
) -> None:
    loop = load(tiny_bundles["fp32"], EngineOptions(num_slots=1, kv_memory=8 << 20))
    loop.start()
    endless = loop.submit(make_request(loop, "endless", 4, loop.capacity - 4))
    await anext(endless)
    endless.cancel()
    tokens, finish = await read(loop.submit(make_request(loop, "next", 4, 2)))
    assert (len(tokens), finish is not None) == (2, True)
    assert [item async for item in endless] == []
    await loop.close()


async def test_a_full_queue_turns_away_with_a_time_to_come_back(tiny_bundles: dict[str, FoundBundle]) -> None:
    options = EngineOptions(num_slots=1, max_waiting_requests=2, kv_memory=8 << 20)
    loop = load(tiny_bundles["fp32"], options)
    loop.start()
    streams = [loop.submit(make_request(loop, str(index), 4, 50)) for index in range(3)]
    with pytest.raises(QueueFull) as refused:
        loop.submit(make_request(loop, "one too many", 4, 50))
    assert refused.value.retry_after_seconds > 0
    assert refused.value.metadata["max_requests"] == "3"
    streams[0].cancel()
    streams.append(loop.submit(make_request(loop, "fits again", 4, 1)))
    for stream in streams[1:]:
        assert (await read(stream))[1] is not None
    await loop.close()


async def test_what_can_never_fit_is_refused_at_once_with_the_limit(tiny_bundles: dict[str, FoundBundle]) -> None:
    loop = load(tiny_bundles["fp32"])
    loop.start()
    with pytest.raises(ContextLengthExceeded, match=f"max_model_len of {loop.capacity}"):
        loop.submit(make_request(loop, "long", loop.capacity, 1))
    per_position = sum(pool.array[0].nbytes for pool in loop._engine.graph.pools) // loop.capacity
    small = load(tiny_bundles["fp32"], EngineOptions(num_slots=2, kv_memory=256 * per_position))
    small.start()
    assert small.capacity == 256
    with pytest.raises(ContextLengthExceeded, match="kv_memory of 256"):
        small.submit(make_request(small, "long", 250, 7))
    assert (await read(small.submit(make_request(small, "exact", 250, 6))))[1] is not None
    await loop.close()
    await small.close()
    with pytest.raises(ValueError, match=f"kv_memory is {255 * per_position} bytes"):
        load(tiny_bundles["fp32"], EngineOptions(num_slots=2, kv_memory=255 * per_position))


async def test_draining_finishes_what_runs_and_takes_nothing_new(tiny_bundles: dict[str, FoundBundle]) -> None:
    loop = load(tiny_bundles["fp32"])
    loop.start()
    running = asyncio.create_task(read(loop.submit(make_request(loop, "running", 4, 60))))
    await asyncio.sleep(0)
    drained = asyncio.create_task(loop.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        loop.submit(make_request(loop, "late", 4, 1))
    assert await drained
    assert (await running)[1] is not None
    await loop.close()


async def test_closing_ends_what_still_runs_with_an_error(tiny_bundles: dict[str, FoundBundle]) -> None:
    loop = load(tiny_bundles["fp32"], EngineOptions(num_slots=1, kv_memory=8 << 20))
    loop.start()
    running = loop.submit(make_request(loop, "running", 4, loop.capacity - 4))
    waiting = loop.submit(make_request(loop, "waiting", 4, 4))
    await anext(running)
    await loop.close()
    for stream in (running, waiting):
        with pytest.raises(Draining):
            await read(stream)


async def test_a_sequence_whose_state_holds_nan_fails_alone(
    engine_loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await read(engine_loop.submit(make_request(engine_loop, "healthy", 9, 40)))
    decode = StepGraph.decode

    def poisoning_decode(
        self: StepGraph, token_ids: list[int], lengths: list[int], real: list[int], first_slot: int
    ) -> object:
        for slot, length in enumerate(lengths, first_slot):
            if length == 60:  # the other one is never as long
                for pool in self.pools:
                    pool.array[slot][:, :9] = np.nan
        return decode(self, token_ids, lengths, real, first_slot)

    monkeypatch.setattr(StepGraph, "decode", poisoning_decode)
    poisoned = engine_loop.submit(make_request(engine_loop, "poisoned", 9, 100))
    neighbour = engine_loop.submit(make_request(engine_loop, "healthy", 9, 40))
    with pytest.raises(ExecutionFailed, match="not finite"):
        await read(poisoned)
    tokens, finish = await read(neighbour)
    assert finish is not None
    assert tokens == expected[0]
    after = await read(engine_loop.submit(make_request(engine_loop, "healthy", 9, 40)))
    assert after[0] == expected[0], "the slot is clean for whoever comes next"


class _Poison(Exception):
    pass


async def test_a_row_on_which_the_graph_raises_fails_alone(
    engine_loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = make_request(engine_loop, "healthy", 9, 20)
    expected = await read(engine_loop.submit(healthy))
    poison = make_request(engine_loop, "poison", 33, 20)
    decode, chunk = StepGraph.decode, StepGraph.chunk

    def is_poison(length: int) -> bool:
        return length == len(poison.prompt) + 5

    def failing_decode(self: StepGraph, token_ids: list[int], lengths: list[int], *rest: object) -> object:
        if any(map(is_poison, lengths)):
            raise _Poison
        return decode(self, token_ids, lengths, *rest)

    def failing_chunk(self: StepGraph, slot: int, token_ids: list[int] | tuple[int, ...], start: int) -> object:
        if len(token_ids) == 1 and is_poison(start + 1):
            raise _Poison
        return chunk(self, slot, token_ids, start)

    monkeypatch.setattr(StepGraph, "decode", failing_decode)
    monkeypatch.setattr(StepGraph, "chunk", failing_chunk)
    poisoned = engine_loop.submit(poison)
    survivor = engine_loop.submit(make_request(engine_loop, "healthy", 9, 20))
    with pytest.raises(ExecutionFailed):
        await read(poisoned)
    tokens, _ = await read(survivor)
    assert tokens == expected[0]
    assert engine_loop.healthy


async def test_a_slow_reader_gets_everything_and_holds_nobody_up(engine_loop: EngineLoop) -> None:
    slow = engine_loop.submit(make_request(engine_loop, "slow", 5, 30))
    fast = await read(engine_loop.submit(make_request(engine_loop, "fast", 5, 30)))
    assert fast[1] is not None
    tokens, finish = await read(slow)
    assert (len(tokens), finish is not None) == (30, True)


async def test_a_prompt_that_begins_as_another_is_answered_to_the_bit_as_if_it_were_computed(
    engine_loop: EngineLoop, tiny_bundles: dict[str, FoundBundle]
) -> None:
    fresh = load(tiny_bundles[engine_loop.manifest.precision])
    fresh.start()
    trunk = make_request(engine_loop, "trunk", 120, 1).prompt
    assert (await read(engine_loop.submit(make_request(engine_loop, "trunk", 120, 30))))[1] is not None
    lengths = (20, 47, 48, 49, 64, 65, 100, 119)
    requests = [
        replace(request, prompt=(*trunk[:length], *request.prompt))
        for length in lengths
        for request in [make_request(engine_loop, f"after {length}", 9, 20)]
    ]
    streams = [engine_loop.submit(request) for request in requests]
    found = await asyncio.gather(*map(read, streams))
    assert [stream.cached_tokens for stream in streams] == list(lengths)
    for request, (tokens, _) in zip(requests, found, strict=True):
        alone = fresh.submit(replace(request, prompt=request.prompt))
        expected, _ = await read(alone)
        assert tokens == expected
        await fresh.close()
        fresh = load(tiny_bundles[engine_loop.manifest.precision])
        fresh.start()
    await fresh.close()
