"""The canary on real graphs: it finds what depends on neighbours, and costs nobody anything."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable

import pytest

from service.bundle import FoundBundle, scan
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import Draining
from service.metrics import ServerMetrics
from service.scheduling.canary import is_replay
from service.scheduling.request import Beam, Request, SamplingParams, Token
from service.token_stream import TokenStream

OPTIONS = EngineOptions(num_slots=6, kv_memory=8 << 20, prefill_chunk_tokens=16, idle_chunk_tokens=32, canary_rate=1.0)


class Watched:
    """A loop with its metrics."""

    def __init__(self, found: FoundBundle) -> None:
        self.metrics = ServerMetrics()
        self.key = found.manifest.key
        self.loop = EngineLoop.load(found, OPTIONS, self.metrics.model(self.key, 288))
        self.loop.start()

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"attendant_{name}", {"model": self.key, **labels})

    @property
    def replays(self) -> tuple[float | None, ...]:
        """How many were the same, different and skipped."""
        return tuple(self.value("canary_replays_total", result=each) for each in ("same", "different", "skipped"))

    def request(self, name: str, max_tokens: int = 12, **fields: object) -> Request:
        rng = random.Random(name)
        settings = {
            "prompt": tuple(rng.randrange(20, 320) for _ in range(40)),
            "sampling": SamplingParams(temperature=0.0),
            "logprobs": True,
            "top_logprobs": 2,
        } | fields
        return Request(request_id=name, max_tokens=max_tokens, arrival=self.loop.clock(), **settings)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Tick, and let events come, until something holds; between looks the engine's thread has the interpreter."""
        async with asyncio.timeout(60):
            while not holds():
                self.loop.tick()
                await asyncio.sleep(0.001)


async def read(stream: TokenStream) -> list[Token]:
    return [token async for item in stream for token in item.tokens]


@pytest.fixture
async def watch(weak_bundles, tiny_bundles: dict[str, FoundBundle]) -> AsyncIterator[Callable[[str], Watched]]:
    found = {bundle.manifest.name: bundle for bundle in scan(weak_bundles.repository)}
    made: list[Watched] = []

    def start(name: str) -> Watched:
        made.append(Watched(found[name]))
        return made[-1]

    yield start
    for watched in made:
        await watched.loop.close()


async def test_replays_of_a_sound_model_are_the_same_whatever_it_was_asked_and_beside_whom(watch) -> None:
    watched = watch("tiny-int8")
    assert watched.replays == (0, 0, 0)
    trunk = watched.request("trunk").prompt
    for index in range(4):
        others = [watched.request(f"{index} {number}", 5 + number) for number in range(5)]
        chosen = watched.request(f"chosen {index}", 20, prompt=(*trunk, *range(20, 30 + index)))
        await asyncio.gather(*(read(watched.loop.submit(request)) for request in (chosen, *others)))
        await watched.until(lambda done=index + 1: sum(watched.replays) == done)
    assert watched.replays == (4, 0, 0)


async def test_a_graph_that_depends_on_the_size_of_its_batch_is_found_and_logged_once(
    watch, caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch("swayed")  # and it has passed every check at load
    for index in range(2):
        requests = [watched.request(f"{index}/{number}", 30) for number in range(3)]
        await asyncio.gather(*(read(watched.loop.submit(request)) for request in requests))
        await watched.until(lambda done=index + 1: sum(watched.replays) == done)
    assert watched.replays == (0, 2, 0)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "swayed/1 answers otherwise alone" in errors[0] and "request 0/0" in errors[0]


async def test_a_replay_reuses_nothing_and_counts_among_nobodys_requests(watch) -> None:
    watched = watch("tiny-int8")
    await read(watched.loop.submit(watched.request("any")))
    names = ("time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "request_queue_seconds_count")
    kinds = ("prompt", "prompt_cached", "output")

    def counts() -> list[float | None]:
        by_length = [watched.value(name, seq_bucket="64") for name in names]
        return by_length + [watched.value("tokens_total", kind=kind) for kind in kinds]

    counted = counts()
    seen: set[tuple[float | None, ...]] = set()

    def is_done() -> bool:
        seen.add((watched.value("requests_running"), watched.value("requests_waiting")))
        return sum(watched.replays) == 1

    computed = watched.value("batch_tokens_total", phase="prefill", kind="real")
    await watched.until(is_done)
    assert watched.value("batch_tokens_total", phase="prefill", kind="real") == computed + 40, "all of it, anew"
    assert seen == {(0, 0)}
    assert counts() == counted
    again = watched.loop.submit(watched.request("any"))
    await read(again)
    assert again.cached_tokens == 38, "and users still find what other users left"


async def test_whoever_comes_ends_a_replay_which_is_tried_again_when_they_are_gone(watch) -> None:
    watched = watch("tiny-int8")
    await read(watched.loop.submit(watched.request("long", 240)))
    watched.loop.tick()
    assert watched.loop._canary.is_replaying
    await watched.until(lambda: any(is_replay(view.request_id) for view in watched.loop.snapshot().sequences))
    stream = watched.loop.submit(watched.request("user", 200))
    assert not watched.loop._canary.is_replaying
    await anext(stream)
    assert [view.request_id for view in watched.loop.snapshot().sequences] == ["user"], "it runs alone"
    watched.loop.tick()
    assert not watched.loop._canary.is_replaying, "not beside anybody"
    await read(stream)
    assert watched.replays == (0, 0, 0)
    await watched.until(lambda: sum(watched.replays) == 1)
    assert watched.replays == (1, 0, 0)


async def test_another_model_that_computes_keeps_the_processor(watch) -> None:
    first, second = watch("tiny-int8"), watch("swayed")
    second.loop._threads = first.loop._threads = [first.loop, second.loop]
    await read(first.loop.submit(first.request("any")))
    busy = second.loop.submit(second.request("busy", 200))
    await anext(busy)
    await first.until(lambda: first.loop.num_active == 2 and not first.loop._canary.is_replaying)
    assert first.replays == (0, 0, 0)
    await read(busy)
    await first.until(lambda: sum(first.replays) == 1)


async def test_a_stream_that_is_cancelled_and_what_is_not_greedy_is_never_replayed(watch) -> None:
    watched = watch("tiny-int8")
    stream = watched.loop.submit(watched.request("given up", 200))
    await anext(stream)
    stream.cancel()
    sampled = watched.request("sampled", sampling=SamplingParams(temperature=0.8, seed=3))
    await read(watched.loop.submit(sampled))
    await read(watched.loop.submit(watched.request("searched", beam=Beam(width=2))))
    watched.loop.tick()
    assert not watched.loop._canary.is_replaying


@pytest.mark.parametrize("is_running", [False, True])
async def test_draining_and_closing_wait_for_no_replay(watch, is_running: bool) -> None:
    watched = watch("tiny-int8")
    await read(watched.loop.submit(watched.request("long", 240)))
    if is_running:
        watched.loop.tick()
        assert watched.loop._canary.is_replaying
    assert await watched.loop.drain(1.0), "nobody waits for anything"
    watched.loop.tick()
    assert watched.loop._canary.is_replaying == is_running, "none begins any more"
    with pytest.raises(Draining):
        watched.loop.submit(watched.request("late"))
