"""How fast the same requests are through a real server, in a process of its own, over a socket."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import grpc
from served import serve
from workloads import Workload

from attendant.v1 import generation_pb2, inference_service_pb2_grpc


@contextlib.contextmanager
def server(repository: Path, names: list[str], threads: int) -> Iterator[str]:
    """Run `python -m service` and yield its address once it is ready."""
    with serve(repository, names, threads) as served:
        yield served.address


def run(address: str, model: str, workload: Workload) -> float:
    """Return generated tokens a second, measured by a client process of its own."""
    arguments = json.dumps({"address": address, "model": model, "workload": asdict(workload)})
    done = subprocess.run([sys.executable, __file__, arguments], capture_output=True, text=True, check=True)
    return float(done.stdout)


async def _client(address: str, model: str, workload: Workload) -> float:
    prompts = list(enumerate(workload.prompts()))
    generated = 0

    async def stream(stub: inference_service_pb2_grpc.InferenceServiceStub) -> None:
        nonlocal generated
        while prompts:
            seed, prompt = prompts.pop(0)
            request = generation_pb2.GenerateRequest(
                model=model,
                token_ids=generation_pb2.TokenIds(ids=prompt),
                sampling=generation_pb2.SamplingParams(
                    max_tokens=workload.output_tokens,
                    temperature=workload.temperature,
                    top_p=workload.top_p,
                    seed=seed,
                ),
                stop=generation_pb2.StopConditions(ignore_eos=True),
            )
            async for response in stub.Generate(request):
                generated += len(response.delta.token_ids)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        await channel.channel_ready()
        started = time.perf_counter()
        await asyncio.gather(*(stream(stub) for _ in range(workload.streams)))
        seconds = time.perf_counter() - started
    assert generated == workload.generated_tokens, (generated, workload)
    return generated / seconds


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(asyncio.run(_client(given["address"], given["model"], Workload(**given["workload"]))))
