"""Sends a trace to a server at its own pace, and records when every token came.

It runs as a process of its own, so that measuring shares no interpreter with whatever else goes on: a job comes from
standard input, what became of each arrival goes to standard output. Times count from when a request was due, so a
client that is behind hides nothing.
"""

import asyncio
import contextlib
import json
import random
import sys
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from workloads import VOCAB

from attendant.v1 import generation_pb2, inference_service_pb2_grpc

Stub = inference_service_pb2_grpc.InferenceServiceStub
LEAD_SECONDS = 0.2  # before the first arrival, so that the channel is there


async def replay(address: str, model: str, arrivals: list[dict[str, Any]], seed: int, *, sends: bool) -> list[Any]:
    """Return what became of each arrival, as fields of an `Outcome`.

    Args:
        address: of the server.
        model: to ask.
        arrivals: fields of each `Arrival`.
        seed: of the prompts, which no other seed shares.
        sends: whether the server is told when a request is of no use any more; otherwise the client hangs up then.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        begin = asyncio.get_running_loop().time() + LEAD_SECONDS
        calls = [
            _one(stub, _message(model, arrival, f"{seed}/{index}"), arrival, begin, sends=sends)
            for index, arrival in enumerate(arrivals)
        ]
        return await asyncio.gather(*calls)


def _message(model: str, arrival: dict[str, Any], seed: str) -> generation_pb2.GenerateRequest:
    draw = random.Random(seed)
    prompt = [draw.randrange(3, VOCAB) for _ in range(arrival["prompt_tokens"])]
    return generation_pb2.GenerateRequest(
        model=model,
        token_ids=generation_pb2.TokenIds(ids=prompt),
        sampling=generation_pb2.SamplingParams(max_tokens=arrival["output_tokens"], temperature=0.0),
        stop=generation_pb2.StopConditions(ignore_eos=True),
    )


async def _one(
    stub: Stub, message: generation_pb2.GenerateRequest, arrival: dict[str, Any], begin: float, *, sends: bool
) -> dict[str, Any]:
    clock = asyncio.get_running_loop().time
    due = begin + arrival["arrival_seconds"]
    await asyncio.sleep(max(0.0, due - clock()))
    first, last, gaps = None, due, []
    budget = arrival["budget_seconds"]
    left = None if budget is None else max(0.001, due + budget - clock())
    ending = "finished"
    call = stub.Generate(message, timeout=left if sends else None)
    try:
        async with asyncio.timeout(None if sends else left):
            async for response in call:
                num_tokens = len(response.delta.token_ids)
                if num_tokens:
                    now = clock()
                    gaps += [0.0] * (num_tokens - 1) if first is None else [now - last, *[0.0] * (num_tokens - 1)]
                    first, last = first or now, now
    except TimeoutError:
        call.cancel()
        ending = "hung up"
    except grpc.aio.AioRpcError as error:
        ending = _ending(error)
    return {
        "ending": ending,
        "ended_seconds": clock() - begin,
        "first_token_seconds": None if first is None else first - begin,
        "gaps": gaps,
    }


def _ending(error: grpc.aio.AioRpcError) -> str:
    reasons = {"DEADLINE_UNREACHABLE": "refused", "QUEUE_FULL": "queue full", "CONTEXT_LENGTH_EXCEEDED": "too long"}
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.reason in reasons:
                    return reasons[info.reason]
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "expired"
    raise error


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        print(json.dumps(asyncio.run(replay(**json.load(sys.stdin)))))
