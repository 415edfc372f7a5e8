"""Deadlines through gRPC: what cannot be finished in time is refused with the prediction, and costs nothing."""

import time

import grpc

from attendant.v1 import generation_pb2 as pb

NUM_TOKENS = 280
MODEL = {"model": "tiny-fp32/1"}


def test_what_would_be_late_is_refused_with_the_prediction(start, refusal_of, eventually) -> None:
    server = start("--models", "tiny-fp32", "--max-num-seqs", "4").wait_ready()
    prompt = pb.TokenIds(ids=[5, 6])
    for _ in range(20):  # it is learned how long answers are
        begun = time.perf_counter()
        list(server.long_answer(NUM_TOKENS, token_ids=prompt))
        seconds = time.perf_counter() - begun

    def is_refused() -> bool:
        others = [server.long_answer(NUM_TOKENS, token_ids=prompt) for _ in range(8)]
        hurried = pb.GenerateRequest()
        hurried.latency_budget.FromMilliseconds(max(1, int(1000 * seconds / 3)))
        refusal = refusal_of(
            lambda: list(
                server.long_answer(NUM_TOKENS, token_ids=prompt, latency_budget=hurried.latency_budget, priority=1)
            )
        )
        for other in others:
            other.cancel()
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
        if refusal.reason != "DEADLINE_UNREACHABLE":  # nothing is refused while predictions are not good enough
            return False
        told = {name: float(refusal.metadata[name]) for name in ("predicted_seconds", "budget_seconds", "running")}
        assert told["predicted_seconds"] > told["budget_seconds"] > 0
        assert told["running"] + float(refusal.metadata["waiting"]) > 0
        return True

    eventually(is_refused)
    eventually(lambda: server.value("attendant_deadline_requests_total", outcome="refused", **MODEL) >= 1)
    eventually(server.is_idle)
