"""Bundles of one process know how many of them compute, for that is what their speed depends on."""

import asyncio

from service.bundle import FoundBundle
from service.bundle_thread import BundleThread
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import ServerMetrics
from service.scheduling.request import Request, SamplingParams


def load(found: FoundBundle) -> EngineLoop:
    metrics = ServerMetrics().model(found.manifest.key, found.manifest.limits.max_model_len)
    return EngineLoop.load(found, EngineOptions(num_slots=4, kv_memory=8 << 20), metrics)


async def test_a_bundle_counts_itself_and_those_that_compute(tiny_bundles: dict[str, FoundBundle]) -> None:
    threads: list[BundleThread] = []
    busy, other = load(tiny_bundles["fp32"]), load(tiny_bundles["int8"])
    assert other.num_active == 1, "alone before it starts"
    busy.start(threads)
    other.start(threads)
    assert threads == [busy, other]
    stream = busy.submit(
        Request(
            request_id="long",
            prompt=(1, 2, 3),
            max_tokens=busy.capacity - 3,
            sampling=SamplingParams(temperature=0.0),
            arrival=busy.clock(),
        )
    )
    seen = set()
    async for _ in stream:
        seen.add((busy.num_active, other.num_active))
    assert {active for active, _ in seen} == {1}, "the other has nothing to do"
    assert 2 in {active for _, active in seen}
    await asyncio.gather(busy.close(), other.close())
    assert threads == []
    assert busy.num_active == 1
