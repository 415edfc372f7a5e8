"""What fails in ONNX Runtime: a row by itself, or the whole engine, and how the two are told apart."""

import asyncio
import gc
import logging
import random
import weakref
from collections.abc import Iterator

import pytest

from service.bundle import FoundBundle, scan
from service.bundle_thread import BundleThread
from service.encode_loop import EncodeCall, EncodeLoop, EncodeOptions, Urgency
from service.engine.encode_graph import Array, Item
from service.engine.step_graph import StepGraph
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import ExecutionFailed, ModelUnavailable
from service.metrics import ServerMetrics
from service.scheduling.request import Beam, Finish, Request, SamplingParams, Token
from service.token_stream import TokenStream

OPTIONS = EngineOptions(num_slots=4, kv_memory=8 << 20, prefill_chunk_tokens=16, idle_chunk_tokens=16)


@pytest.fixture
def found(weak_bundles, tiny_bundles: dict[str, FoundBundle]) -> dict[str, FoundBundle]:
    """The weak bundles, by name; the others are exported first, see `tiny_bundles`."""
    return {bundle.manifest.name: bundle for bundle in scan(weak_bundles.repository)}


@pytest.fixture
async def engine_loop(found: dict[str, FoundBundle]) -> Iterator[EngineLoop]:
    loop = EngineLoop.load(found["weak"], OPTIONS, ServerMetrics().model("weak/1", 288))
    loop.start()
    yield loop
    await loop.close()


@pytest.fixture
async def encode_loop(found: dict[str, FoundBundle]) -> Iterator[EncodeLoop]:
    loop = EncodeLoop.load(found["weak-encoder"], EncodeOptions(), ServerMetrics().model("weak/1", 288, "embed"))
    loop.start()
    yield loop
    await loop.close()


def make_request(name: str, max_tokens: int = 30, **fields: object) -> Request:
    rng = random.Random(name)
    prompt = tuple(rng.randrange(20, 320) for _ in range(40))
    greedy = SamplingParams(temperature=0.0)
    settings = {"prompt": prompt, "sampling": greedy, "logprobs": True, "top_logprobs": 4} | fields
    return Request(request_id=name, max_tokens=max_tokens, arrival=EngineLoop.clock(), **settings)


def fatal_request(name: str, way: str, token: int) -> Request:
    """A request that feeds a token in a prompt's first chunk, to a decode row, or to a beam search."""
    request = make_request(name)
    if way == "decode":
        forced = SamplingParams(temperature=0.0, logit_bias=((token, 1e6),))
        return make_request(name, sampling=forced)
    prompt = (*request.prompt[:5], token, *request.prompt[5:])
    return make_request(name, prompt=prompt, beam=Beam(width=2) if way == "beam" else None)


async def read(stream: TokenStream) -> tuple[list[Token], Finish | None]:
    tokens: list[Token] = []
    finish = None
    async for item in stream:
        tokens += item.tokens
        finish = item.finish
    return tokens, finish


async def encode(loop: EncodeLoop, item: Item) -> EncodeCall[Array]:
    call = loop.submit([item], lambda array: array.copy(), Urgency(arrival=loop.clock()))
    return await loop.result(call)


@pytest.mark.parametrize("way", ["prefill", "decode", "beam"])
@pytest.mark.parametrize("kind", ["raising", "nan"])
async def test_a_row_that_fails_ends_alone_and_its_neighbours_keep_their_bits(
    engine_loop: EngineLoop, weak_bundles, way: str, kind: str
) -> None:
    token = getattr(weak_bundles, f"{kind}_token")
    requests = [make_request("healthy"), make_request("found", beam=Beam(width=2))]
    alone = [await read(engine_loop.submit(request)) for request in requests]
    fatal = engine_loop.submit(fatal_request("fatal", way, token))
    streams = [engine_loop.submit(request) for request in requests]
    with pytest.raises(ExecutionFailed, match="not finite" if kind == "nan" else "graph failed"):
        await read(fatal)
    for (tokens, finish), stream in zip(alone, streams, strict=True):
        tokens_beside, finish_beside = await read(stream)
        assert (tokens, finish.hypotheses) == (tokens_beside, finish_beside.hypotheses)
    assert engine_loop.healthy
    assert engine_loop.snapshot().reserved == 0


async def test_requests_that_nothing_could_answer_are_not_taken_for_a_broken_engine(
    engine_loop: EngineLoop, weak_bundles
) -> None:
    expected, _ = await read(engine_loop.submit(make_request("healthy")))
    for index in range(12):
        token = (weak_bundles.raising_token, weak_bundles.nan_token)[index % 2]
        with pytest.raises(ExecutionFailed):
            await read(engine_loop.submit(fatal_request(str(index), ("prefill", "decode", "beam")[index % 3], token)))
    assert engine_loop.healthy
    assert (await read(engine_loop.submit(make_request("healthy"))))[0] == expected


async def test_a_text_that_fails_fails_alone(encode_loop: EncodeLoop, weak_bundles) -> None:
    sound = Item(length=6, token_ids=(2, 20, 21, 22, 23, 3))
    for token in (weak_bundles.raising_token, weak_bundles.nan_token):
        fatal = Item(length=6, token_ids=(2, 20, token, 22, 23, 3))
        calls = [encode(encode_loop, item) for item in (sound, fatal, sound)]
        first, failed, second = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(failed, ExecutionFailed)
        assert (first.results[0] == second.results[0]).all()
        with pytest.raises(ExecutionFailed):
            await encode(encode_loop, fatal)
    assert encode_loop.healthy


async def test_an_engine_that_fails_whatever_it_is_given_ends_with_every_request_told(
    engine_loop: EngineLoop, weak_bundles
) -> None:
    running = [engine_loop.submit(make_request(str(index), max_tokens=200)) for index in range(6)]  # two of them wait
    await anext(running[0])
    weak_bundles.spoil("weak")
    reason = await engine_loop.wait_failed()
    assert "whatever it is given" in reason
    ends = await asyncio.gather(*map(read, running), return_exceptions=True)
    told = [end for end in ends if isinstance(end, ModelUnavailable)]
    assert all(isinstance(end, ModelUnavailable | ExecutionFailed) for end in ends), "a step may be half done by then"
    assert len(told) >= 4
    assert all("fails whatever" in end.message and end.retry_after_seconds > 0 for end in told)
    assert not engine_loop.healthy
    with pytest.raises(ModelUnavailable, match="fails whatever"):
        engine_loop.submit(make_request("late"))


async def test_an_encoder_that_fails_whatever_it_is_given_ends_with_every_call_told(
    encode_loop: EncodeLoop, weak_bundles
) -> None:
    item = Item(length=4, token_ids=(2, 20, 21, 3))
    weak_bundles.spoil("weak-encoder")
    with pytest.raises(ModelUnavailable, match="fails whatever"):
        await encode(encode_loop, item)
    assert "whatever it is given" in await encode_loop.wait_failed()
    with pytest.raises(ModelUnavailable):
        await encode(encode_loop, item)


async def test_a_fault_of_ours_ends_the_engine_too(engine_loop: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_order(self: StepGraph, *arguments: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(StepGraph, "begin", out_of_order)  # which ONNX Runtime has no part in
    with pytest.raises(ModelUnavailable, match="ValueError"):
        await read(engine_loop.submit(make_request("any")))


@pytest.mark.parametrize("kind", ["engine", "encoder"])
async def test_a_failed_thread_holds_neither_session_nor_memory(
    found: dict[str, FoundBundle], weak_bundles, kind: str
) -> None:
    loop: BundleThread
    if kind == "engine":
        loop = EngineLoop.load(found["weak"], OPTIONS, ServerMetrics().model("weak/1", 288))
        graph = weakref.ref(loop._engine.graph)
        weak_bundles.spoil("weak")
    else:
        loop = EncodeLoop.load(found["weak-encoder"], EncodeOptions(), ServerMetrics().model("weak/1", 288, "embed"))
        graph = weakref.ref(loop._graph)
        weak_bundles.spoil("weak-encoder")
    loop.start()
    gc.disable()  # what is loaded is not looked at by the collector: no cycle may hold it
    logging.disable()  # the test's own records hold the frames of exceptions
    try:
        with pytest.raises(ModelUnavailable):
            if isinstance(loop, EngineLoop):
                await read(loop.submit(make_request("any")))
            else:
                await encode(loop, Item(length=3, token_ids=(2, 20, 3)))
        await loop.close()
        assert graph() is None
    finally:
        gc.enable()
        logging.disable(logging.NOTSET)
    assert isinstance(loop, BundleThread), "whoever still holds it, holds nothing else"
