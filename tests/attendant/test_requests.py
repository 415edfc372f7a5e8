"""Every option reaches its field of the request; nothing else does, and nothing is sent that was not said."""

import typing

import pytest

from attendant import GenerateOptions, Message, _messages
from attendant.v1 import generation_pb2 as pb

OPTIONS: GenerateOptions = {
    "max_tokens": 5,
    "min_tokens": 0,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 0.5,
    "min_p": 0.0,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.0,
    "frequency_penalty": -1.0,
    "logit_bias": {7: -100.0},
    "seed": 2**64 - 1,
    "n": 1,
    "stop": ["\n", "User:"],
    "stop_token_ids": [3, 4],
    "ignore_eos": False,
    "logprobs": True,
    "top_logprobs": 2,
    "echo": False,
    "alignment": True,
    "priority": 0,
    "latency_budget": 1.5,
    "request_id": "mine",
    "encoder_text": "",
    "beam_width": 4,
    "length_penalty": 0.0,
}


def build(prompt=None, messages=None, token_ids=None, image=None, **options):
    return _messages.generate_request("tiny", prompt, messages, token_ids, image, options)


def test_every_option_has_a_field_and_every_field_an_option():
    assert set(OPTIONS) == set(typing.get_type_hints(GenerateOptions)) == set(_messages._PLACES)
    in_messages = {(where, field) for where, field in _messages._PLACES.values() if where}
    fields = {
        (where, field.name)
        for where, message in (
            ("sampling", pb.SamplingParams),
            ("stop", pb.StopConditions),
            ("output", pb.OutputOptions),
            ("beam", pb.BeamSearch),
        )
        for field in message.DESCRIPTOR.fields
    }
    assert in_messages == fields


def test_every_option_arrives_zeros_included():
    request = build("hi", **OPTIONS)
    assert request.prompt == "hi" and request.model == "tiny"
    for name, (where, field) in _messages._PLACES.items():
        message = getattr(request, where) if where else request
        value = getattr(message, field)
        if name == "latency_budget":
            assert value.ToNanoseconds() == 1_500_000_000
        elif isinstance(OPTIONS[name], list | dict):
            assert type(OPTIONS[name])(value) == OPTIONS[name]
        else:
            assert value == pytest.approx(OPTIONS[name])
            assert name in ("request_id", "beam_width") or message.HasField(field)


def test_what_is_not_said_is_not_sent():
    bare = pb.GenerateRequest(model="tiny", prompt="hi")
    assert build("hi") == build("hi", **dict.fromkeys(OPTIONS)) == bare
    assert build(encoder_text="hi") == pb.GenerateRequest(model="tiny", encoder_text="hi")


def test_one_stop_string_is_not_taken_for_its_letters():
    assert list(build("hi", stop="User:").stop.strings) == ["User:"]


def test_the_inputs_are_told_apart_even_when_empty():
    assert build("").WhichOneof("input") == "prompt"
    assert build(messages=[]).WhichOneof("input") == "messages"
    assert build(token_ids=[]).WhichOneof("input") == "token_ids"
    assert list(build(token_ids=range(3)).token_ids.ids) == [0, 1, 2]
    assert build(image=b"").WhichOneof("input") == "image"


def test_turns_of_a_conversation_may_be_spelt_three_ways():
    turns = [Message("user", "a"), ("user", "a"), {"role": "user", "content": "a"}]
    assert {message.SerializeToString() for message in build(messages=turns).messages.messages} == {
        pb.ChatMessage(role="user", content="a").SerializeToString()
    }


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ValueError, "exactly one of prompt, messages, token_ids and image"),
        ({"prompt": "a", "image": b"a"}, ValueError, "exactly one"),
        ({"prompt": "a", "token_ids": [1]}, ValueError, "exactly one"),
        ({"prompt": "a", "max_token": 1}, TypeError, "unknown option 'max_token'; known: .*max_tokens"),
        ({"prompt": "a", "max_tokens": 2**31}, ValueError, "max_tokens: .*2147483648"),
        ({"prompt": "a", "seed": -1}, ValueError, "seed: .*-1"),
        ({"prompt": "a", "temperature": "hot"}, TypeError, "temperature: must be real number"),
        ({"prompt": "\ud800"}, ValueError, "prompt: .*surrogate"),
        ({"token_ids": [2**31]}, ValueError, "token_ids: "),
        ({"messages": ["hello"]}, TypeError, r"messages\[0\] is 'hello'"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, TypeError, r"messages\[0\]"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, said):
    with pytest.raises(error, match=said):
        build(**arguments)
