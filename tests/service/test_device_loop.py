"""The engine loop with everything on a device, here the host's memory, beside the loop of the CPU: the same answers."""

import asyncio
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from attendant.bundle import FileRef, file_sha256
from export.sampler import write_sampler
from service.bundle import BundleRefused, FoundBundle
from service.engine.device import DeviceError, HostDevice
from service.engine.device_graph import DeviceGraph
from service.engine.device_sampler import DeviceSampler
from service.engine.pools import free_for_states
from service.engine_loop import EngineLoop, EngineOptions
from service.errors import ExecutionFailed
from service.metrics import ServerMetrics
from service.scheduling.request import Beam, Finish, Request, SamplingParams, Token
from service.scheduling.scheduler import Scheduler

OPTIONS = EngineOptions(num_slots=6, kv_memory=8 << 20, prefill_chunk_tokens=16, idle_chunk_tokens=48, threads=2)


@pytest.fixture(scope="module")
def found(tiny_bundles: dict[str, FoundBundle], tmp_path_factory: pytest.TempPathFactory) -> FoundBundle:
    """The tiny fp32 bundle with graphs that choose tokens, as a bundle for CUDA has them."""
    tiny = tiny_bundles["fp32"]
    directory = tmp_path_factory.mktemp("device") / "1"
    shutil.copytree(tiny.directory, directory)
    assert tiny.manifest.vocabulary is not None
    sampler = write_sampler(directory, tiny.manifest.vocabulary.size)
    files = [_file(directory / name) for graph in sampler for name in (graph.file, graph.data) if name]
    manifest = tiny.manifest.model_copy(
        update={"graphs": (*tiny.manifest.graphs, *sampler), "files": (*tiny.manifest.files, *files)}
    )
    return FoundBundle(directory, manifest, tiny.sha256)


def _file(path: Path) -> FileRef:
    return FileRef(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def requests() -> list[Request]:
    """Requests of many kinds, most of them with a beginning that others have, too."""
    rng = random.Random(0)
    trunk = [rng.randrange(3, 300) for _ in range(90)]
    samplings = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, seed=2, top_k=20, top_p=0.9),
        SamplingParams(temperature=0.9, seed=3, repetition_penalty=1.2, presence_penalty=0.5),
        SamplingParams(temperature=0.0, logit_bias=((17, 2.0),), frequency_penalty=0.3),
        SamplingParams(temperature=1.2, seed=4, min_p=0.05),
    )
    found = []
    for number in range(24):
        shared, own = rng.randint(0, 90), rng.randint(1, 60)
        prompt = (*trunk[:shared], *(rng.randrange(3, 300) for _ in range(own)))
        beam = Beam(width=3) if number % 8 == 7 else None
        found.append(
            Request(
                request_id=f"r/{number}",
                prompt=prompt,
                max_tokens=rng.randint(1, 40),
                sampling=SamplingParams(temperature=0.0) if beam else samplings[number % len(samplings)],
                beam=beam,
                eos_token_ids=frozenset({2}),
                logprobs=beam is not None or number % 3 == 0,
                top_logprobs=6 if beam else 2 * (number % 3 == 0),
                arrival=EngineLoop.clock(),
            )
        )
    return found


async def answers(loop: EngineLoop, wanted: Sequence[Request]) -> list[tuple[list[Token], Finish | None]]:
    async def read(request: Request) -> tuple[list[Token], Finish | None]:
        tokens: list[Token] = []
        finish = None
        async for item in loop.submit(request):
            tokens += item.tokens
            finish = item.finish
        return tokens, finish

    loop.start()
    try:
        return await asyncio.gather(*map(read, wanted))
    finally:
        await loop.close()


def load(found: FoundBundle, device: HostDevice | None = None, **changes: object) -> EngineLoop:
    options = EngineOptions(**{name: getattr(OPTIONS, name) for name in EngineOptions.__slots__} | changes)
    return EngineLoop.load(found, options, ServerMetrics().model("tiny/1", 288), device)


@pytest.mark.parametrize("captures", [True, False])
async def test_requests_of_all_kinds_get_the_same_answers_as_on_the_cpu(found: FoundBundle, captures: bool) -> None:
    expected = await answers(load(found), requests())
    given = await answers(load(found, HostDevice(), cuda_graphs=captures), requests())
    for (ours, finish), (theirs, end) in zip(given, expected, strict=True):
        assert [token.token_id for token in ours] == [token.token_id for token in theirs]
        assert finish is not None and end is not None and finish.reason == end.reason
        for one, other in zip(ours, theirs, strict=True):
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [each.token_ids for each in finish.hypotheses] == [each.token_ids for each in end.hypotheses]


async def test_memory_decides_how_many_run_at_once_and_all_of_a_slot_is_there(found: FoundBundle) -> None:
    slot = 3 * 2 * 2 * 16 * 4 * 288
    loop = load(found, HostDevice(), kv_memory=2 * slot + 1)
    assert (loop.num_slots, loop.capacity) == (2, 288)
    expected = await answers(load(found), [each for each in requests() if each.beam is None])
    given = await answers(loop, [each for each in requests() if each.beam is None])
    assert [[token.token_id for token in tokens] for tokens, _ in given] == [
        [token.token_id for token in tokens] for tokens, _ in expected
    ]
    with pytest.raises(ValueError, match=f"must be at least {slot}: one slot of tiny-fp32/1 holds 288 tokens"):
        load(found, HostDevice(), kv_memory=slot - 1)


async def test_without_a_budget_the_devices_free_memory_decides(found: FoundBundle) -> None:
    loop = load(found, HostDevice(), kv_memory=None, num_bundles=1000)
    assert loop.num_slots == OPTIONS.num_slots


def test_states_get_most_of_what_weights_leave_free() -> None:
    assert free_for_states(100 << 30, 20 << 30, 1) == int(0.85 * (80 << 30))
    assert free_for_states(100 << 30, 20 << 30, 4) == int(0.85 * (80 << 30)) // 4
    assert free_for_states(1 << 30, 2 << 30, 1) == 0


@pytest.mark.parametrize("what", ["decode", "launch", "collect"])
async def test_where_a_step_fails_its_rows_are_tried_one_by_one(
    found: FoundBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    expected = await answers(load(found), requests())
    calls = 0

    def failing(original):
        def run(self, *arguments):
            nonlocal calls
            several = sum(each is not None for each in (arguments[0] if arguments else self._samples)) > 1
            calls += several
            if several and calls % 3 == 0:
                raise DeviceError("as if the device had failed")
            return original(self, *arguments)

        return run

    loop = load(found, HostDevice())
    owner = DeviceGraph if what == "decode" else DeviceSampler
    monkeypatch.setattr(owner, what, failing(getattr(owner, what)))
    given = await answers(loop, requests())
    assert calls > 3
    assert [[token.token_id for token in tokens] for tokens, _ in given] == [
        [token.token_id for token in tokens] for tokens, _ in expected
    ]


async def test_a_request_whose_logits_are_not_finite_fails_alone(
    found: FoundBundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = load(found, HostDevice())
    chunk = DeviceGraph.chunk
    victim, *others = requests()[:6]

    def poisoned(self: DeviceGraph, slot: int, token_ids: tuple[int, ...], start: int) -> range:
        rows = chunk(self, slot, token_ids, start)
        if victim.prompt[start : start + len(token_ids)] == token_ids:
            row = self.logits[rows.start : rows.stop]
            self.device.upload(np.full(row.shape, np.nan, np.float32), row)
        return rows

    monkeypatch.setattr(DeviceGraph, "chunk", poisoned)
    monkeypatch.setattr(DeviceGraph, "joins_prompts", False)

    async def failed() -> None:
        with pytest.raises(ExecutionFailed, match="not finite"):
            async for _ in loop.submit(victim):
                pass

    async def read(request: Request) -> list[Token]:
        return [token async for item in loop.submit(request) for token in item.tokens]

    loop.start()
    try:
        _, *given = await asyncio.gather(failed(), *map(read, others))
    finally:
        await loop.close()
    assert all(given)


async def test_a_device_that_cannot_be_used_refuses_the_bundle_with_its_reason(found: FoundBundle) -> None:
    class Full(HostDevice):
        def allocate(self, shape, dtype):
            raise DeviceError("cudaMalloc: out of memory")

    with pytest.raises(BundleRefused, match="cudaMalloc: out of memory"):
        load(found, Full())


async def test_while_a_step_is_computed_the_last_is_told_and_the_next_planned(
    found: FoundBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = load(found, HostDevice())
    told: list[str] = []
    launch, collect, publish = DeviceSampler.launch, DeviceSampler.collect, EngineLoop._hand_over

    def noted(name: str, original):
        def run(self, *arguments):
            if name != "tell" or self._unpublished is not None:
                told.append(name)
            return original(self, *arguments)

        return run

    monkeypatch.setattr(DeviceSampler, "launch", noted("launch", launch))
    monkeypatch.setattr(DeviceSampler, "collect", noted("collect", collect))
    monkeypatch.setattr(EngineLoop, "_hand_over", noted("tell", publish))
    monkeypatch.setattr(Scheduler, "schedule", noted("plan", Scheduler.schedule))
    loop.start()
    request = Request(request_id="r/one", prompt=(5, 6, 7), max_tokens=4, arrival=loop.clock())
    assert len([token async for item in loop.submit(request) for token in item.tokens]) == 4
    await loop.close()
    assert told == ["plan", "launch", "plan", "collect", *["launch", "tell", "plan", "collect"] * 3, "tell"]
