"""What a bad request gets: code, reason, and the field with its value and limit."""

import pytest

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as service_pb
from attendant.v1 import model_service_pb2

CONTEXT = 288  # of the tiny bundles


def sampling(**fields: object) -> dict[str, object]:
    return {"sampling": pb.SamplingParams(**fields)}


BAD_FIELDS = [
    ({"prompt": ""}, "prompt", "''", "not be empty"),
    ({"prompt": "x" * (300 << 10)}, "prompt", "307200 bytes", "262144"),
    ({"token_ids": pb.TokenIds()}, "token_ids.ids", "[]", "not be empty"),
    ({"token_ids": pb.TokenIds(ids=[5, 320])}, "token_ids.ids[1]", "320", "319"),
    ({"token_ids": pb.TokenIds(ids=[-1])}, "token_ids.ids[0]", "-1", "0 to 319"),
    ({"messages": pb.ChatMessages()}, "messages.messages", "[]", "not be empty"),
    (sampling(max_tokens=0), "sampling.max_tokens", "0", "at least 1"),
    (sampling(max_tokens=2, min_tokens=3), "sampling.min_tokens", "3", "2"),
    (sampling(temperature=-1), "sampling.temperature", "-1.0", "[0, 10]"),
    (sampling(temperature=float("nan")), "sampling.temperature", "nan", "[0, 10]"),
    (sampling(top_p=0), "sampling.top_p", "0.0", "(0, 1]"),
    (sampling(top_k=-2), "sampling.top_k", "-2", "0"),
    (sampling(min_p=1), "sampling.min_p", "1.0", "[0, 1)"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty", "0.0", "(0, 10]"),
    (sampling(presence_penalty=3), "sampling.presence_penalty", "3.0", "[-2, 2]"),
    (sampling(frequency_penalty=-3), "sampling.frequency_penalty", "-3.0", "[-2, 2]"),
    (sampling(logit_bias={320: 1.0}), "sampling.logit_bias", "320", "319"),
    (sampling(n=0), "sampling.n", "0", "1"),
    ({"stop": pb.StopConditions(strings=[""])}, "stop.strings[0]", "''", "256"),
    ({"stop": pb.StopConditions(token_ids=[320])}, "stop.token_ids[0]", "320", "319"),
    ({"output": pb.OutputOptions(top_logprobs=2)}, "output.top_logprobs", "2", "logprobs"),
    ({"output": pb.OutputOptions(top_logprobs=21, logprobs=True)}, "output.top_logprobs", "21", "20"),
    ({"priority": 101}, "priority", "101", "100"),
    ({"request_id": "\n"}, "request_id", "\\n", "128"),
]


@pytest.mark.parametrize(("fields", "field", "value", "limit"), BAD_FIELDS)
def test_a_bad_field_is_an_invalid_argument_with_field_value_and_limit(
    server, refusal_of, fields: dict[str, object], field: str, value: str, limit: str
) -> None:
    refusal = refusal_of(lambda: list(server.generate(**fields)))
    assert (refusal.code.name, refusal.reason, refusal.domain) == ("INVALID_ARGUMENT", "INVALID_FIELD", "attendant")
    assert refusal.field == refusal.metadata["field"] == field
    for part in (field, value, limit):
        assert part in refusal.message


def test_a_request_without_input_is_an_invalid_argument(server, refusal_of) -> None:
    refusal = refusal_of(lambda: list(server.inference.Generate(pb.GenerateRequest(model="tiny-fp32"))))
    assert (refusal.code.name, refusal.field) == ("INVALID_ARGUMENT", "input")


@pytest.mark.parametrize("num_tokens", [CONTEXT, CONTEXT - 9, 5000])
def test_a_prompt_and_answer_beyond_the_context_are_an_invalid_argument(server, refusal_of, num_tokens: int) -> None:
    ids = pb.TokenIds(ids=[5] * num_tokens)
    refusal = refusal_of(lambda: list(server.generate(token_ids=ids, **sampling(max_tokens=10))))
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
    expected = {"prompt_tokens": str(num_tokens), "max_tokens": "10", "max_model_len": str(CONTEXT)}
    assert refusal.metadata == expected
    assert all(number in refusal.message for number in expected.values())


def test_a_long_text_is_refused_in_the_same_way(server, refusal_of) -> None:
    refusal = refusal_of(lambda: list(server.generate(prompt="word " * 1000)))
    assert refusal.reason == "CONTEXT_LENGTH_EXCEEDED"


def test_what_just_fits_is_served(server) -> None:
    ids = pb.TokenIds(ids=[5] * (CONTEXT - 10))
    events = list(server.generate(token_ids=ids, **sampling(max_tokens=10), stop=pb.StopConditions(ignore_eos=True)))
    assert events[-1].finished.usage.output_tokens == 10


@pytest.mark.parametrize(
    "fields",
    [
        {"audio": b"RIFF", "token_ids": None},
    ],
)
def test_what_is_declared_but_not_built_is_refused(server, refusal_of, fields: dict[str, object]) -> None:
    refusal = refusal_of(lambda: list(server.generate(**fields)))
    assert (refusal.code.name, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")


@pytest.mark.parametrize(
    "fields",
    [sampling(n=2), {"encoder_text": "x"}, {"image": b"\x89PNG", "token_ids": None}, {"beam": pb.BeamSearch()}],
)
def test_what_a_model_without_a_source_or_a_request_without_a_search_cannot_use_is_refused(
    server, refusal_of, fields: dict[str, object]
) -> None:
    refusal = refusal_of(lambda: list(server.generate(**fields)))
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.mark.parametrize("model", ["nobody", "tiny-fp32/2", "tiny-fp32/1/1"])
def test_an_unknown_model_is_not_found(server, refusal_of, model: str) -> None:
    calls = [
        lambda: list(server.generate(model)),
        lambda: server.inference.Tokenize(service_pb.TokenizeRequest(model=model, text="x")),
        lambda: server.inference.Detokenize(service_pb.DetokenizeRequest(model=model, token_ids=[1])),
        lambda: server.models.GetModel(model_service_pb2.GetModelRequest(model=model)),
    ]
    for call in calls:
        refusal = refusal_of(call)
        assert (refusal.code.name, refusal.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
        assert model in refusal.message
        assert "tiny-fp32/1" in refusal.message


def test_invalid_utf8_is_an_invalid_argument(server, refusal_of) -> None:
    content = pb.GenerateRequest(model="tiny-fp32", prompt="MARK").SerializeToString().replace(b"MARK", b"ab\xff\xfe")
    call = server.channel.unary_stream("/attendant.v1.InferenceService/Generate")
    refusal = refusal_of(lambda: list(call(content)))
    assert (refusal.code.name, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert refusal.field == "prompt"
    assert "UTF-8" in refusal.message


def test_a_message_beyond_the_limit_is_refused_by_grpc(server, refusal_of) -> None:
    refusal = refusal_of(lambda: list(server.generate(prompt="x" * (5 << 20))))
    assert refusal.code.name == "RESOURCE_EXHAUSTED"
    assert "4194304" in refusal.message


@pytest.mark.parametrize(
    ("request_fields", "field"),
    [
        ({}, "input"),
        ({"text": "x" * (300 << 10)}, "text"),
        ({"messages": pb.ChatMessages()}, "messages.messages"),
        (
            {
                "messages": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")]),
                "add_special_tokens": True,
            },
            "add_special_tokens",
        ),
    ],
)
def test_bad_tokenise_requests_are_refused(server, refusal_of, request_fields: dict[str, object], field: str) -> None:
    request = service_pb.TokenizeRequest(model="tiny-fp32", **request_fields)
    refusal = refusal_of(lambda: server.inference.Tokenize(request))
    assert (refusal.code.name, refusal.field) == ("INVALID_ARGUMENT", field)


@pytest.mark.parametrize(("ids", "field"), [([1, 320], "token_ids[1]"), ([1] * (CONTEXT + 1), "token_ids")])
def test_bad_detokenise_requests_are_refused(server, refusal_of, ids: list[int], field: str) -> None:
    request = service_pb.DetokenizeRequest(model="tiny-fp32", token_ids=ids)
    refusal = refusal_of(lambda: server.inference.Detokenize(request))
    assert (refusal.code.name, refusal.field) == ("INVALID_ARGUMENT", field)


def test_refusals_disturb_nobody_and_are_counted_by_reason(server, refusal_of) -> None:
    labels = {"model": "tiny-int8/1", "reason": "invalid_field"}
    before = server.value("attendant_requests_rejected_total", **labels)
    refusal_of(lambda: list(server.generate("tiny-int8", **sampling(top_p=2))))
    assert server.value("attendant_requests_rejected_total", **labels) == before + 1
    unknown = server.value("attendant_requests_rejected_total", model="_unknown", reason="model_not_found")
    refusal_of(lambda: list(server.generate("anything")))
    after = server.value("attendant_requests_rejected_total", model="_unknown", reason="model_not_found")
    assert after == unknown + 1
    assert list(server.generate("tiny-int8"))
