"""After known traffic a scrape over HTTP shows exactly that traffic."""

from prometheus_client.parser import text_string_to_metric_families

from attendant.v1 import generation_pb2 as pb

MODEL = {"model": "tiny-fp32/1"}


def test_traffic_is_counted_by_length_code_and_reason(start, refusal_of, eventually) -> None:
    server = start("--models", "tiny-fp32", "--seq-buckets", "16,64,128").wait_ready()
    lengths = (5, 16, 18, 100, 200)
    for length in lengths:
        list(server.long_answer(20, token_ids=pb.TokenIds(ids=[length] * length)))
    refusal_of(lambda: list(server.generate(prompt="")))
    refusal_of(lambda: list(server.generate("nobody")))
    refusal_of(lambda: list(server.generate(audio=b"RIFF", token_ids=None)))

    def count(name: str, **labels: str) -> float:
        return server.value(f"attendant_{name}", **MODEL, **labels)

    by_length = {"16": 2, "64": 1, "128": 1, "+Inf": 1}
    for family in ("time_to_first_token", "request_queue", "request_prefill", "request_duration"):
        for bucket, expected in by_length.items():
            assert count(f"{family}_seconds_count", seq_bucket=bucket) == expected, (family, bucket)
    assert count("inter_token_latency_seconds_count") == 19 * len(lengths)
    # A gap counts under the context's length at the later token: 5 + 20 tokens cross from 16 to 64.
    assert count("inter_token_latency_seconds_count", seq_bucket="16") == 16 - 5
    assert count("tokens_total", kind="output") == 20 * len(lengths)
    assert count("tokens_total", kind="prompt") == sum(lengths)
    assert count("batch_tokens_total", kind="real") == sum(lengths) + 19 * len(lengths)
    assert count("step_seconds_count", phase="prefill") == len(lengths)
    assert count("batch_size_sum", phase="decode") == 19 * len(lengths)
    assert count("requests_total", code="OK", task="generate") == len(lengths)
    assert count("requests_total", code="INVALID_ARGUMENT", task="generate") == 1
    assert count("requests_total", code="UNIMPLEMENTED", task="generate") == 1
    assert count("requests_rejected_total", reason="unsupported") == 1
    assert count("requests_finished_total", reason="length") == len(lengths)
    assert count("request_prompt_tokens_sum") == sum(lengths)
    assert server.value("attendant_requests_total", model="_unknown", code="NOT_FOUND") == 1
    assert server.value("attendant_model_info", name="tiny-fp32", version="1", precision="fp32") == 1
    assert server.value("attendant_build_info") == 1
    eventually(lambda: count("requests_running") == count("requests_waiting") == count("kv_cache_usage_ratio") == 0)
    families = list(text_string_to_metric_families(server.get("/metrics")))
    assert sum(len(family.samples) for family in families) < 1500
    assert all(family.documentation for family in families)
    assert {family.name.partition("_")[0] for family in families} == {"attendant", "grpc", "process", "python"}


def test_time_to_first_token_is_at_least_queue_and_prefill(server) -> None:
    list(server.long_answer(5))
    first_token = server.value("attendant_time_to_first_token_seconds_sum", **MODEL)
    parts = server.value("attendant_request_queue_seconds_sum", **MODEL)
    parts += server.value("attendant_request_prefill_seconds_sum", **MODEL)
    assert abs(first_token - parts) < 1e-3
