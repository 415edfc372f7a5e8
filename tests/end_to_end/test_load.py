"""More requests than fit, clients that hang up, deadlines that pass."""

import threading

import grpc

from attendant.v1 import generation_pb2 as pb

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
        eventually(lambda: server.value("attendant_requests_running") + server.value("attendant_requests_waiting") == 0)
    assert server.value("attendant_requests_finished_total", reason="cancelled", **MODEL) == 6
    assert server.value("attendant_requests_total", code="CANCELLED", **MODEL) == 6
    generated = server.value("attendant_tokens_total", kind="output", **MODEL)
    assert generated < 6 * 270, "nobody went on computing for them"
    assert server.value("attendant_kv_cache_tokens", state="used", **MODEL) == 0
    assert list(server.long_answer(5))[-1].finished.usage.output_tokens == 5


def test_a_request_whose_deadline_passes_ends_and_is_counted(start, refusal_of, eventually) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "1").wait_ready()
    others = [server.long_answer(280, token_ids=pb.TokenIds(ids=[5, 6])) for _ in range(8)]
    assert all(next(other).WhichOneof("event") == "started" for other in others)
    refusal = refusal_of(lambda: list(server.long_answer(280, token_ids=pb.TokenIds(ids=[5]), timeout=0.1)))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    for other in others:
        other.cancel()
    eventually(lambda: server.value("attendant_requests_total", code="DEADLINE_EXCEEDED", **MODEL) == 1)
    eventually(lambda: server.value("attendant_requests_running") + server.value("attendant_requests_waiting") == 0)
