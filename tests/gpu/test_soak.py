"""A random crowd for as long as one likes: every request ends once, nothing is left over, nothing breaks."""

import asyncio
import collections
import random
import time

import grpc
import pytest

from attendant.v1 import generation_pb2 as pb
from attendant.v1.inference_service_pb2_grpc import InferenceServiceStub

CLIENTS = 24
MEBIBYTE = 1 << 20
SHORT_SECONDS = {"CPU": 3.0, "GPU": 30.0}
LONG_SECONDS = 300.0


async def soak(served, seconds: float) -> collections.Counter[str]:
    """Let clients ask for all kinds of answers, one of which in five hangs up; return how calls ended."""
    ends: collections.Counter[str] = collections.Counter()
    until = time.monotonic() + seconds

    async def one(stub: InferenceServiceStub, draw: random.Random) -> None:
        start, length = draw.randrange(10_000), draw.randint(1, 200)
        max_tokens = draw.randint(1, 256 - length)
        gives_up_after = draw.randrange(max_tokens) if draw.random() < 0.2 else None
        sampling = draw.choice([{"temperature": 0}, {"top_p": 0.9}, {"top_k": 20, "repetition_penalty": 1.2}])
        call = stub.Generate(
            pb.GenerateRequest(
                model=served.model,
                token_ids=pb.TokenIds(ids=served.text[start : start + length]),
                sampling=pb.SamplingParams(max_tokens=max_tokens, seed=draw.getrandbits(32), **sampling),
                stop=pb.StopConditions(ignore_eos=True),
                output=pb.OutputOptions(logprobs=draw.random() < 0.5),
            )
        )
        kinds: list[str] = []
        num_tokens = 0
        try:
            async for event in call:
                kinds.append(str(event.WhichOneof("event")))
                num_tokens += len(event.delta.token_ids)
                if gives_up_after is not None and num_tokens > gives_up_after:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            ends[error.code().name] += 1
            return
        except asyncio.CancelledError:
            ends["CANCELLED"] += 1
            return
        ends["OK"] += 1
        assert (kinds[0], kinds[-1], kinds.count("finished"), num_tokens) == ("started", "finished", 1, max_tokens)

    async def client(stub: InferenceServiceStub, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            await one(stub, draw)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}") as channel:
        stub = InferenceServiceStub(channel)
        await asyncio.gather(*(client(stub, number) for number in range(CLIENTS)))
    return ends


async def check(served, seconds: float, eventually) -> None:
    before = served.value("requests_total")
    ends = await soak(served, seconds / 5)
    eventually(served.is_idle)
    level = served.memory_bytes
    ends += await soak(served, seconds * 4 / 5)
    eventually(served.is_idle)
    assert set(ends) <= {"OK", "CANCELLED"} and min(ends["OK"], ends["CANCELLED"]) > 0, ends
    eventually(lambda: served.value("requests_total") - before == sum(ends.values()))
    assert served.value("requests_finished_total", reason="error") == 0
    assert served.memory_bytes <= level + 64 * MEBIBYTE
    assert served.value("model_restarts_total") == 0
    assert served.server.status_of(f"model/{served.model}") == "SERVING"
    assert "Traceback" not in served.server.log.read_text()


async def test_a_crowd_leaves_nothing_behind(served, eventually) -> None:
    await check(served, SHORT_SECONDS["GPU" if served.on_gpu else "CPU"], eventually)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("served", ["cpu-fp32", pytest.param("cuda-bf16", marks=pytest.mark.gpu)], indirect=True)
async def test_a_crowd_leaves_nothing_behind_after_five_minutes(served, eventually) -> None:
    await check(served, LONG_SECONDS, eventually)
