"""A request that protobuf cannot parse is refused with the field to blame."""

import random

import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2, model_service_pb2
from service.rpc.malformed import Malformed, tolerant

MARK = "MARK"
BAD = b"M\xff\xfeK"

CASES = [
    (pb.GenerateRequest(model=MARK, prompt="x"), "model"),
    (pb.GenerateRequest(model="m", prompt=MARK), "prompt"),
    (pb.GenerateRequest(model="m", encoder_text=MARK), "encoder_text"),
    (pb.GenerateRequest(model="m", stop=pb.StopConditions(strings=["a", MARK])), "stop.strings[1]"),
    (
        pb.GenerateRequest(messages=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=MARK)])),
        "messages.messages[0].content",
    ),
    (pb.GenerateRequest(sampling=pb.SamplingParams(logit_bias={1: 1.0}), request_id=MARK), "request_id"),
    (inference_service_pb2.TokenizeRequest(model="m", text=MARK), "text"),
    (model_service_pb2.GetModelRequest(model=MARK), "model"),
    (health_pb2.HealthCheckRequest(service=MARK), "service"),
]


@pytest.mark.parametrize(("message", "field"), CASES)
def test_invalid_utf8_names_the_field_and_the_byte(message: Message, field: str) -> None:
    parsed = tolerant(type(message))(message.SerializeToString().replace(MARK.encode(), BAD))
    assert isinstance(parsed, Malformed)
    error = parsed.explain()
    assert error.field == field
    assert "UTF-8" in error.limit
    assert "byte 1" in error.limit


def test_bytes_are_not_taken_for_text() -> None:
    message = pb.GenerateRequest(image=BAD, request_id=MARK)
    parsed = tolerant(pb.GenerateRequest)(message.SerializeToString().replace(MARK.encode(), BAD))
    assert isinstance(parsed, Malformed)
    assert parsed.explain().field == "request_id"


def test_what_is_no_message_at_all_is_refused_as_such() -> None:
    random_numbers = random.Random(0)
    for _ in range(300):
        content = random_numbers.randbytes(random_numbers.randrange(1, 40))
        parsed = tolerant(pb.GenerateRequest)(content)
        if isinstance(parsed, Malformed):
            assert parsed.explain().field


def test_a_good_request_is_parsed_as_ever() -> None:
    message = pb.GenerateRequest(model="m", prompt="grüße")
    assert tolerant(pb.GenerateRequest)(message.SerializeToString()) == message
