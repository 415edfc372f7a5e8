"""A bundle is loaded again when its engine has failed; the others go on as if nothing had happened."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from service.app.backoff import Backoff
from service.app.bundle_keeper import BundleKeeper, Stage
from service.app.loading import load
from service.bundle import FoundBundle, scan
from service.encode_loop import EncodeOptions, Urgency
from service.engine.encode_graph import Item
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import ModelUnavailable
from service.metrics import ServerMetrics
from service.rpc.catalog import Entry, ModelCatalog, State
from service.rpc.readiness import health_of
from service.scheduling.request import Request, SamplingParams

OPTIONS = EngineOptions(num_slots=4, kv_memory=8 << 20)


class Site:
    """What a server has, and the keepers of its bundles."""

    def __init__(self, bundles: dict[str, FoundBundle]) -> None:
        self.bundles = bundles
        self.catalog = ModelCatalog()
        self.metrics = ServerMetrics()
        self.lines: list[str] = []
        self.changed = asyncio.Event()
        self.health: list[dict[str, bool]] = []
        self.stage = Stage(
            catalog=self.catalog,
            metrics=self.metrics,
            threads=[],
            store=None,
            announce=self.lines.append,
            refresh=self._refresh,
        )
        self.tasks: list[asyncio.Task[None]] = []

    def _refresh(self) -> None:
        self.health.append(health_of(self.catalog, loading=False, draining=False))
        self.changed.set()

    async def keep(self, name: str, backoff: Backoff) -> BundleKeeper:
        bundle = self.bundles[name]
        loads = partial(load, bundle, "cpu", OPTIONS, EncodeOptions(), self.metrics)
        keeper = BundleKeeper(bundle, loads, self.stage, backoff)
        await keeper.open()
        self.tasks.append(asyncio.create_task(keeper.keep()))
        return keeper

    def entry(self, name: str) -> Entry:
        return self.catalog.find(name)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    def value(self, sample: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"attendant_{sample}", labels)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for model in self.catalog.served:
            await model.loop.close()


@pytest.fixture
async def site(weak_bundles, tiny_bundles: dict[str, FoundBundle]) -> AsyncIterator[Site]:
    site = Site({bundle.manifest.name: bundle for bundle in scan(weak_bundles.repository)})
    yield site
    await site.close()


async def answer(loop: EngineLoop, name: str, max_tokens: int = 8) -> list[int]:
    rng = random.Random(name)
    request = Request(
        request_id=name,
        prompt=tuple(rng.randrange(20, 320) for _ in range(20)),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0),
        arrival=loop.clock(),
    )
    return [token.token_id async for item in loop.submit(request) for token in item.tokens]


async def test_a_model_that_fails_is_down_loaded_again_and_answers_as_before(site: Site, weak_bundles) -> None:
    await site.keep("weak", Backoff(tries=20, first_seconds=0.05))
    await site.keep("tiny-int8", Backoff(tries=0, first_seconds=1.0))
    weak, other = site.entry("weak").served, site.entry("tiny-int8").served
    expected, expected_other = await answer(weak.loop, "a"), await answer(other.loop, "b", 200)
    learned = weak.loop.latency.observations("decode")
    assert site.value("model_restarts_total", model="weak/1", result="succeeded") == 0
    stop = asyncio.Event()

    async def ask_the_other() -> int:
        asked = 0
        while not stop.is_set():
            assert await answer(other.loop, f"b{asked}", 2) is not None
            assert await answer(other.loop, "b", 200) == expected_other
            asked += 1
        return asked

    asking = asyncio.create_task(ask_the_other())
    weak_bundles.spoil("weak")
    with pytest.raises(ModelUnavailable):
        await answer(weak.loop, "a")
    await site.until(lambda: site.entry("weak").state is State.LOADING)
    assert site.entry("weak").served is None
    assert "failed while it was served" in site.entry("weak").reason
    with pytest.raises(ModelUnavailable, match="load it again") as refused:
        site.catalog.resolve("weak")
    assert refused.value.retry_after_seconds > 0
    assert site.value("model_ready", model="weak/1") == 0
    await site.until(lambda: "SHA-256" in site.entry("weak").reason)
    weak_bundles.mend("weak")
    await site.until(lambda: site.entry("weak").state is State.READY)
    stop.set()
    assert await asking > 0, "the other one never stopped answering, nor differently"
    again = site.entry("weak").served
    assert again.loop is not weak.loop
    assert again.loop.latency.observations("decode") >= learned, "what was learned of latency is kept"
    assert await answer(again.loop, "a") == expected
    seen = [(health["model/weak"], health["model/tiny-int8"], health["liveness"]) for health in site.health[-4:]]
    assert seen[-1] == (True, True, True)
    assert (False, True, True) in seen
    assert all(health["readiness"] for health in site.health), "another model is served all the while"
    assert site.value("model_restarts_total", model="weak/1", result="succeeded") == 1
    assert site.value("model_restarts_total", model="weak/1", result="failed") >= 1
    assert site.value("model_ready", model="weak/1") == 1


async def test_a_model_that_cannot_be_loaded_again_is_given_up_with_the_reason(site: Site, weak_bundles) -> None:
    await site.keep("weak-encoder", Backoff(tries=2, first_seconds=0.01))
    await site.keep("weak", Backoff(tries=2, first_seconds=0.01))
    weak_bundles.spoil("weak")
    with pytest.raises(ModelUnavailable):
        await answer(site.entry("weak").served.loop, "a")
    await site.until(lambda: site.entry("weak").state is State.UNAVAILABLE)
    assert "SHA-256" in site.entry("weak").reason
    assert "2 tries" in site.entry("weak").reason
    with pytest.raises(ModelUnavailable) as refused:
        site.catalog.resolve("weak")
    assert refused.value.retry_after_seconds is None, "nobody should wait for it"
    assert site.value("model_restarts_total", model="weak/1", result="failed") == 2
    assert [line.partition(":")[0] for line in site.lines[2:]] == [*["RESTARTING weak/1"] * 2, "FAILED weak/1"]
    assert site.health[-1]["liveness"], "the other one is served, and a restart of the process would end that"
    assert site.health[-1]["readiness"]
    encoder = site.entry("weak-encoder").served.loop
    weak_bundles.spoil("weak-encoder")
    with pytest.raises(ModelUnavailable):
        item = Item(length=3, token_ids=(2, 20, 3))
        await encoder.result(encoder.submit([item], lambda array: array, Urgency(arrival=encoder.clock())))
    await site.until(lambda: site.entry("weak-encoder").state is State.UNAVAILABLE)
    assert not site.health[-1]["liveness"], "nothing is left that could ever serve"
    assert not site.health[-1]["readiness"]


async def test_a_server_that_stops_loads_nothing_again(site: Site, weak_bundles) -> None:
    await site.keep("weak", Backoff(tries=5, first_seconds=60.0))
    weak_bundles.spoil("weak")
    with pytest.raises(ModelUnavailable):
        await answer(site.entry("weak").served.loop, "a")
    await site.until(lambda: site.entry("weak").state is State.LOADING)
    await site.close()
    assert site.catalog.served == []
    assert site.lines[-1].startswith("RESTARTING")


async def test_a_bundle_that_is_unfit_from_the_first_is_refused_without_another_try(site: Site, weak_bundles) -> None:
    weak_bundles.spoil("weak")
    await site.keep("weak", Backoff(tries=5, first_seconds=0.01))
    assert site.entry("weak").state is State.UNAVAILABLE
    assert site.lines == [f"REFUSED weak/1: {site.entry('weak').reason}"]
    await asyncio.wait_for(site.tasks[0], 10)
