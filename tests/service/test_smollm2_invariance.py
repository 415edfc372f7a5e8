"""Promise P2 on the real model: neighbours, load and chunking change no bit of a result, in fp32 and in int8."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from service.bundle import FoundBundle, scan
from service.engine.pools import pool_size
from service.engine.runtime import use_threads
from service.engine.step_graph import StepGraph
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import ServerMetrics
from service.scheduling.request import Request, SamplingParams, Token
from service.scheduling.scheduler import chunk_length

pytestmark = pytest.mark.smollm2

VOCAB = 49152
NAMES = {"fp32": "smollm2-135m-fp32", "int8": "smollm2-135m"}
KV_MEMORY = 2 << 30


def found(repository: Path, precision: str) -> FoundBundle:
    name = NAMES[precision]
    return next(each for each in scan(repository) if isinstance(each, FoundBundle) and each.manifest.name == name)


@pytest.fixture(params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, smollm2_repository: Path) -> FoundBundle:
    return found(smollm2_repository, request.param)


async def generate(loop: EngineLoop, request: Request) -> list[Token]:
    tokens: list[Token] = []
    async for item in loop.submit(request):
        tokens += item.tokens
    return tokens


async def test_a_request_gives_the_same_bits_alone_and_among_1_7_and_31_neighbours(bundle: FoundBundle) -> None:
    options = EngineOptions(num_slots=32, kv_memory=KV_MEMORY)
    loop = EngineLoop.load(bundle, options, ServerMetrics().model(bundle.manifest.key, 8192))
    loop.start()

    def make(name: str, prompt: int, max_tokens: int, sampling: SamplingParams) -> Request:
        rng = random.Random(name)
        return Request(
            request_id=name,
            prompt=tuple(rng.randrange(3, VOCAB) for _ in range(prompt)),
            max_tokens=max_tokens,
            sampling=sampling,
            logprobs=True,
            top_logprobs=5,
            arrival=loop.clock(),
        )

    greedy, warm = SamplingParams(temperature=0.0), SamplingParams(temperature=0.8, top_p=0.95, seed=7)
    watched = [make("greedy", 90, 20, greedy), make("sampled", 41, 20, warm)]
    alone = [await generate(loop, request) for request in watched]
    for neighbours in (1, 7, 31):
        rng = random.Random(neighbours)

        async def neighbour(index: int, rng: random.Random = rng, number: int = neighbours) -> None:
            for turn in range(3):  # arrives, leaves, and another takes its place
                await asyncio.sleep(rng.random() * 0.05)
                name = f"{number}-{index}-{turn}"
                request = make(name, rng.randint(1, 150), rng.randint(1, 12), rng.choice([greedy, warm]))
                stream = loop.submit(request)
                async for _ in stream:
                    if rng.random() < 0.1:
                        stream.cancel()

        tasks = [asyncio.create_task(neighbour(index)) for index in range(neighbours)]
        among = await asyncio.gather(*(generate(loop, request) for request in watched))
        assert among == alone, f"{neighbours} neighbours changed a token or the bits of a log-probability"
        await asyncio.gather(*tasks)
    await loop.close()


def cut(length: int, limit: int) -> list[int]:
    """Chunks as the scheduler cuts them."""
    sizes = []
    while length:
        sizes.append(chunk_length(length, limit))
        length -= sizes[-1]
    return sizes


# Lengths around multiples of every tile of queries that attention may take.
@pytest.mark.parametrize("length", [2, 33, 65, 66, 97, 129, 161, 257, 300])
def test_a_prompt_gives_the_same_logits_and_states_whatever_the_limit_of_a_chunk(
    length: int, bundle: FoundBundle
) -> None:
    use_threads(2)
    graph = StepGraph(bundle, 2, pool_size(bundle.manifest, 2, KV_MEMORY).capacity)
    rng = random.Random(length)
    prompt = [rng.randrange(3, VOCAB) for _ in range(length)]
    reference: np.ndarray | None = None
    for limit in (10_000, 4, 17, 33, 64, 100, 129, 256):
        start = 0
        for size in cut(length, limit):
            logits = graph.chunk(int(reference is not None), prompt[start : start + size], start)
            start += size
        if reference is None:
            reference = logits
        assert np.array_equal(logits, reference), f"chunks {cut(length, limit)}"
        for pool in graph.pools:
            assert limit == 10_000 or np.array_equal(pool.array[0][:, :length], pool.array[1][:, :length])


# No length leaves a tile of a single query; 33 and 65 would.
@pytest.mark.parametrize("lengths", [(48, 48), (48, 40, 30), (18, 34, 60, 64), (20, 19, 18, 16), (300, 2), (2,) * 8])
def test_prompts_read_together_give_the_same_logits_and_states_as_alone(
    lengths: tuple[int, ...], bundle: FoundBundle
) -> None:
    use_threads(2)
    num_rows = len(lengths)
    graph = StepGraph(bundle, num_rows + 2, 512)
    assert graph.joins_prompts
    rng = random.Random(num_rows)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    together = graph.prompts(1, prompts)
    for row, prompt in enumerate(prompts):
        assert np.array_equal(graph.chunk(num_rows + 1, prompt, 0)[0], together[row])
        for pool in graph.pools:
            alone, among = pool.array[num_rows + 1], pool.array[1 + row]
            assert np.array_equal(alone[:, : len(prompt)], among[:, : len(prompt)])
