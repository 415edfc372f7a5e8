"""More requests than fit, clients that hang up, deadlines that pass."""

import asyncio
import collections
import random
import threading

import grpc

from attendant.v1 import generation_pb2 as pb
from attendant.v1.inference_service_pb2_grpc import InferenceServiceStub

MODEL = {"model": "tiny-fp32/1"}


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(start, refusal_of) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "1", "--max-waiting-requests", "1").wait_ready()
    barrier = threading.Barrier(24)
    answers: list[int] = []
    refusals = []

    def call() -> None:
        barrier.wait()
        try:
            answers.append(len(list(server.long_answer())))
        except grpc.RpcError as error:
            refusals.append(error)

    threads = [threading.Thread(target=call) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers, "somebody is served"
    assert refusals, "24 do not fit into 2 places"

    def again() -> None:
        raise refusals[0]

    refusal = refusal_of(again)
    assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert 0 < refusal.retry_seconds <= 30
    assert server.value("attendant_requests_rejected_total", reason="queue_full", **MODEL) == len(refusals)
    assert server.value("attendant_requests_total", code="OK", **MODEL) == len(answers)
    assert list(server.long_answer(5)), "and afterwards there is room"


def test_a_client_that_hangs_up_frees_its_slot(start, eventually) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "1").wait_ready()
    for _ in range(3):
        call = server.long_answer(270, token_ids=pb.TokenIds(ids=[5, 6]))
        assert next(call).WhichOneof("event") == "started"
        assert next(call).WhichOneof("event") == "delta"
        waiting = server.long_answer(270, token_ids=pb.TokenIds(ids=[5, 6]))
        assert next(waiting).WhichOneof("event") == "started"
        call.cancel()
        waiting.cancel()
        eventually(server.is_idle)
    assert server.value("attendant_requests_finished_total", reason="cancelled", **MODEL) == 6
    assert server.value("attendant_requests_total", code="CANCELLED", **MODEL) == 6
    generated = server.value("attendant_tokens_total", kind="output", **MODEL)
    assert generated < 6 * 270, "nobody went on computing for them"
    assert list(server.long_answer(5))[-1].finished.usage.output_tokens == 5


def test_a_request_whose_deadline_passes_ends_and_is_counted(start, refusal_of, eventually) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "1").wait_ready()
    # More urgent than it is, and so many that they cannot all be finished in the time that it has.
    others = [server.long_answer(280, token_ids=pb.TokenIds(ids=[5, 6]), priority=1) for _ in range(24)]
    assert all(next(other).WhichOneof("event") == "started" for other in others)
    refusal = refusal_of(lambda: list(server.long_answer(280, token_ids=pb.TokenIds(ids=[5]), timeout=0.1)))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    for other in others:
        other.cancel()
    eventually(lambda: server.value("attendant_requests_total", code="DEADLINE_EXCEEDED", **MODEL) == 1)
    eventually(server.is_idle)


async def test_every_request_of_a_random_crowd_ends_exactly_once(start, eventually) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "6", "--max-waiting-requests", "40").wait_ready()
    random_numbers = random.Random(7)
    ends: collections.Counter[str] = collections.Counter()

    async def one(stub: InferenceServiceStub, number: int) -> None:
        gives_up_after = random_numbers.randrange(12) if random_numbers.random() < 0.3 else None
        max_tokens = random_numbers.randrange(1, 60)
        call = stub.Generate(
            pb.GenerateRequest(
                model="tiny-fp32",
                token_ids=pb.TokenIds(ids=[random_numbers.randrange(3, 320) for _ in range(number % 200 + 1)]),
                sampling=pb.SamplingParams(max_tokens=max_tokens, seed=number),
                stop=pb.StopConditions(ignore_eos=True),
            )
        )
        events = []
        try:
            async for event in call:
                events.append(event)
                if gives_up_after is not None and len(events) > gives_up_after:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            ends[error.code().name] += 1
            return
        except asyncio.CancelledError:
            ends["CANCELLED"] += 1
            return
        ends["OK"] += 1
        kinds = [event.WhichOneof("event") for event in events]
        assert (kinds[0], kinds[-1], kinds.count("finished")) == ("started", "finished", 1)
        assert sum(len(event.delta.token_ids) for event in events) == max_tokens

    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = InferenceServiceStub(channel)
        await asyncio.gather(*(one(stub, number) for number in range(300)))
    assert sum(ends.values()) == 300
    assert ends["OK"] > 20
    assert ends["CANCELLED"] > 5
    assert ends["RESOURCE_EXHAUSTED"] > 20
    assert set(ends) <= {"OK", "CANCELLED", "RESOURCE_EXHAUSTED"}
    # A call that the client cancels in its last moment may count as OK here: the sum is what must be right.
    eventually(lambda: server.value("attendant_requests_total", **MODEL) == 300)
    eventually(server.is_idle)
    finished = server.value("attendant_requests_finished_total", **MODEL)
    assert finished + server.value("attendant_requests_rejected_total", **MODEL) == 300
    assert list(server.long_answer(5))
