"""Whatever clients invent, the number of series stays what it is."""

import contextlib
import random

import grpc
from google.protobuf import duration_pb2
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from attendant.v1 import (
    classification_pb2,
    embedding_pb2,
    explain_pb2,
    fill_mask_pb2,
    inference_service_pb2,
    model_service_pb2,
    scoring_pb2,
    tagging_pb2,
)
from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as service_pb
from service.metrics import ServerMetrics
from service.metrics.model import CODES, rejections

MOST = 1500  # series of a server with one model
METHODS = {
    "Generate": pb.GenerateRequest,
    "Embed": embedding_pb2.EmbedRequest,
    "Classify": classification_pb2.ClassifyRequest,
    "TagTokens": tagging_pb2.TagTokensRequest,
    "FillMask": fill_mask_pb2.FillMaskRequest,
    "Score": scoring_pb2.ScoreRequest,
    "Explain": explain_pb2.ExplainRequest,
    "Tokenize": service_pb.TokenizeRequest,
    "Detokenize": service_pb.DetokenizeRequest,
}


def series(server) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (sample.name, frozenset(sample.labels.items()))
        for family in text_string_to_metric_families(server.get("/metrics"))
        for sample in family.samples
    }


def flood(server, seed: int) -> None:
    """Call every method with names, tenants, lengths, deadlines and bytes that nobody else uses."""
    numbers = random.Random(seed)

    def word() -> str:
        return "".join(numbers.choices("abcdefghij-/_0123456789", k=numbers.randrange(1, 30)))

    for _ in range(30):
        metadata = (("x-attendant-tenant", word()), ("x-" + str(numbers.randrange(10**6)), word()))
        for method, message in METHODS.items():
            for model in ("tiny-fp32", "tiny-fp32/1", word(), ""):
                unlike = server.channel.unary_stream(
                    f"/attendant.v1.InferenceService/{method}",
                    request_serializer=lambda request: (
                        request if isinstance(request, bytes) else request.SerializeToString()
                    ),
                    response_deserializer=bytes,
                )
                request = message(model=model) if numbers.random() < 0.8 else numbers.randbytes(20)
                timeout = numbers.choice((60.0, 60.0, 0.001))
                with contextlib.suppress(grpc.RpcError):
                    list(unlike(request, timeout=timeout, metadata=metadata))
        unknown = server.channel.unary_unary(f"/attendant.v1.InferenceService/{word()}")
        with contextlib.suppress(grpc.RpcError):
            unknown(b"", timeout=60)
        with contextlib.suppress(grpc.RpcError):
            server.models.GetModel(model_service_pb2.GetModelRequest(model=word()), timeout=60)
        budget = duration_pb2.Duration(nanos=numbers.randrange(1, 10**9))
        sampling = pb.SamplingParams(max_tokens=numbers.randrange(1, 40), seed=numbers.randrange(2**60))
        tokens = pb.TokenIds(ids=[7] * numbers.randrange(1, 300))
        with contextlib.suppress(grpc.RpcError):
            list(
                server.generate(
                    token_ids=tokens,
                    sampling=sampling,
                    priority=numbers.randrange(-5, 6),
                    latency_budget=budget,
                    request_id=word(),
                )
            )


def test_a_flood_of_invented_names_makes_no_series(start) -> None:
    server = start("--models", "tiny-fp32").wait_ready()
    flood(server, 1)
    after_one = series(server)
    flood(server, 2)
    after_two = series(server)
    new = after_two - after_one
    # A code that was only now met by some method is all that may be new.
    assert {name for name, _ in new} <= {"attendant_requests_total", "grpc_server_handled_total"}, new
    values = {value for name, labels in after_two for key, value in labels if key in ("model", "grpc_method", "task")}
    known = {"tiny-fp32/1", "_unknown", *METHODS, "ListModels", "GetModel", "Check", "List", "Watch"}
    assert {value for value in values if not value.islower()} <= known
    assert {value for value in values if value.islower()} - known <= {
        *("generate", "embed", "classify", "tag", "fill_mask", "score", "explain", "tokenize", "detokenize")
    }
    assert len(after_two) < MOST
    names = {dict(labels).get("model", "") for _, labels in after_two}
    assert names == {"", "tiny-fp32/1", "_unknown"}


def test_a_server_in_the_worst_case_has_few_enough_series() -> None:
    """Every method of the catalogue ends in every code that a server of ours can give, and every length occurs."""
    metrics = ServerMetrics()
    model = metrics.model("m/1", longest=8192)
    model.memory_is(4096, 16, 32)
    model.loaded(1.0, sha256="0", family="decoder", precision="int8", target="cpu")
    codes = (*CODES, "NOT_FOUND")
    for descriptor in (inference_service_pb2, model_service_pb2, health_pb2):
        for service in descriptor.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                calls = metrics.method(service.full_name, method.name, streams=method.server_streaming)
                for code in codes:
                    calls.ended(code, 1.0)
    tasks = ("generate", "embed", "classify", "tag", "fill_mask", "score", "explain", "tokenize", "detokenize")
    for task in tasks:
        for code in codes:
            metrics.answered("m/1", task, code)
            metrics.answered(None, task, code)
    for reason in (*rejections(), "model_not_found"):
        metrics.turned_away("m/1", reason)
        metrics.turned_away(None, reason)
    num_series = sum(len(family.samples) for family in metrics.registry.collect())
    assert num_series < MOST
