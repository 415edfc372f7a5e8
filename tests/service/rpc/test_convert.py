"""Every limit of the protos is kept, every default resolved, nothing is ignored."""

import math
from dataclasses import replace

import pytest
from google.protobuf.duration_pb2 import Duration

from attendant.bundle import DType, GraphKind, GraphSpec, Manifest, Role, SamplingDefaults, TensorSpec
from attendant.v1 import generation_pb2 as pb
from service.errors import AttendantError, ContextLengthExceeded, InvalidField, Unsupported
from service.rpc.convert import (
    Conversation,
    Inputs,
    PromptImage,
    PromptText,
    PromptTokens,
    check_width,
    read_input,
    read_inputs,
    read_options,
    to_request,
)
from service.scheduling.request import Beam, Request, SamplingParams

NAN = float("nan")


def options_error(manifest: Manifest, **fields: object) -> AttendantError:
    with pytest.raises(AttendantError) as refused:
        read_options(pb.GenerateRequest(model="m", prompt="x", **fields), manifest)
    return refused.value


def input_error(**fields: object) -> AttendantError:
    with pytest.raises(AttendantError) as refused:
        read_input(pb.GenerateRequest(model="m", **fields), max_bytes=100, capacity=16, capacity_name="max_model_len")
    return refused.value


def request_of(manifest: Manifest, num_prompt: int, capacity: int = 1000, **sampling: object) -> Request:
    message = pb.GenerateRequest(model="m", prompt="x", sampling=pb.SamplingParams(**sampling))
    options = read_options(message, manifest)
    return to_request(options, (1,) * num_prompt, engine_id="1", capacity=capacity, arrival=5.0, deadline=None)


BAD_SAMPLING = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 10.5),
    ("temperature", NAN),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", NAN),
    ("min_p", -0.1),
    ("min_p", 1.0),
    ("min_p", NAN),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 10.1),
    ("repetition_penalty", NAN),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("presence_penalty", NAN),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", math.inf),
    ("n", 0),
    ("n", -3),
]


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING)
def test_a_sampling_field_out_of_range_is_named_with_value_and_limit(
    manifest: Manifest, field: str, value: float
) -> None:
    error = options_error(manifest, sampling=pb.SamplingParams(**{field: value}))
    assert isinstance(error, InvalidField)
    assert error.field == f"sampling.{field}"
    assert repr(value) in error.message, "the value is shown as the caller wrote it"
    assert any(character.isdigit() for character in error.limit)


EDGES = [
    {"max_tokens": 1, "min_tokens": 1},
    {"temperature": 0.0},
    {"temperature": 10.0},
    {"top_k": 0},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"repetition_penalty": 10.0},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"n": 1},
    {"seed": 2**64 - 1},
    {"logit_bias": {0: -100.0, 1: 100.0}},
]


@pytest.mark.parametrize("sampling", EDGES)
def test_a_sampling_field_at_its_limit_is_taken(manifest: Manifest, sampling: dict[str, object]) -> None:
    read = request_of(manifest, 4, **sampling)
    for field, value in sampling.items():
        if field in ("max_tokens", "min_tokens"):
            assert getattr(read, field) == value
        elif field == "logit_bias":
            assert read.sampling.logit_bias == ((0, -100.0), (1, 100.0))
        elif field != "n":
            assert getattr(read.sampling, field) == value


def test_a_silent_request_gets_the_bundles_defaults_and_then_the_apis(manifest: Manifest) -> None:
    plain = request_of(manifest, 4).sampling
    assert plain == SamplingParams(seed=plain.seed)
    advice = SamplingDefaults(temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5)
    advised = manifest.model_copy(update={"sampling_defaults": advice})
    silent = request_of(advised, 4).sampling
    assert (silent.temperature, silent.top_k, silent.top_p, silent.repetition_penalty) == (0.5, 7, 0.25, 1.5)
    told = request_of(advised, 4, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0).sampling
    assert told == SamplingParams(temperature=0.0, seed=told.seed), "zero is a value, not silence"


def test_an_absent_seed_is_drawn_anew_and_a_seed_of_zero_is_kept(manifest: Manifest) -> None:
    drawn = {request_of(manifest, 4).sampling.seed for _ in range(8)}
    assert len(drawn) == 8
    assert all(0 <= seed < 2**64 for seed in drawn)
    assert request_of(manifest, 4, seed=0).sampling.seed == 0


def test_max_tokens_defaults_to_256_or_what_is_left(manifest: Manifest) -> None:
    assert request_of(manifest, 4).max_tokens == 256
    assert request_of(manifest, 900).max_tokens == 100
    assert request_of(manifest, 999).max_tokens == 1
    assert request_of(manifest, 1000).max_tokens == 1, "that it does not fit is for the engine to say"


def test_min_tokens_above_max_tokens_is_contradictory_even_if_max_tokens_is_a_default(manifest: Manifest) -> None:
    for fields in ({"max_tokens": 5, "min_tokens": 6}, {"min_tokens": 257}):
        with pytest.raises(InvalidField, match="at most sampling") as refused:
            request_of(manifest, 4, **fields)
        assert refused.value.field == "sampling.min_tokens"


@pytest.mark.parametrize(
    ("output", "words"),
    [({"top_logprobs": 21, "logprobs": True}, "20"), ({"top_logprobs": -1}, "0"), ({"top_logprobs": 3}, "logprobs")],
)
def test_output_options_that_contradict_or_exceed_are_refused(
    manifest: Manifest, output: dict[str, object], words: str
) -> None:
    error = options_error(manifest, output=pb.OutputOptions(**output))
    assert isinstance(error, InvalidField)
    assert error.field == "output.top_logprobs"
    assert words in error.limit


@pytest.mark.parametrize(
    ("stop", "field"),
    [
        ({"strings": ["x"] * 17}, "stop.strings"),
        ({"strings": ["ok", ""]}, "stop.strings[1]"),
        ({"strings": ["x" * 257]}, "stop.strings[0]"),
        ({"token_ids": [1] * 65}, "stop.token_ids"),
        ({"token_ids": [1, -1]}, "stop.token_ids[1]"),
        ({"token_ids": [10**6]}, "stop.token_ids[0]"),
    ],
)
def test_stop_conditions_beyond_their_limits_are_refused(
    manifest: Manifest, stop: dict[str, object], field: str
) -> None:
    error = options_error(manifest, stop=pb.StopConditions(**stop))
    assert isinstance(error, InvalidField)
    assert error.field == field


@pytest.mark.parametrize("bias", [{-1: 0.0}, {10**6: 0.0}, {1: 100.5}, {1: NAN}, {1: -math.inf}])
def test_logit_bias_outside_vocabulary_or_range_is_refused(manifest: Manifest, bias: dict[int, float]) -> None:
    error = options_error(manifest, sampling=pb.SamplingParams(logit_bias=bias))
    assert isinstance(error, InvalidField)
    assert error.field.startswith("sampling.logit_bias")


def test_logit_bias_has_a_bounded_number_of_entries(manifest: Manifest) -> None:
    error = options_error(manifest, sampling=pb.SamplingParams(logit_bias={i: 0.0 for i in range(1025)}))
    assert isinstance(error, InvalidField)
    assert "1024" in error.limit


def test_what_the_api_declares_but_nobody_built_is_refused(manifest: Manifest) -> None:
    with pytest.raises(Unsupported, match="audio"):
        inputs_of(manifest, audio=b"x")


def reading(manifest: Manifest, role: Role) -> Manifest:
    """A bundle that writes about texts of at most 9 tokens, or about images; only its manifest."""
    tensors = (
        TensorSpec(name="source", role=role, dtype=DType.INT64, axes=("rows", "source")),
        TensorSpec(name="memory", role=Role.STATE, dtype=DType.FLOAT32, axes=("rows", "source", 4)),
    )
    encode = GraphSpec(kind=GraphKind.ENCODE, file="encode.onnx", inputs=tensors[:1], outputs=tensors[1:])
    limits = manifest.limits.model_copy(update={"max_source_len": 9})
    return manifest.model_copy(update={"graphs": (*manifest.graphs, encode), "limits": limits})


def inputs_of(manifest: Manifest, **fields: object) -> Inputs:
    message = pb.GenerateRequest(model="m", **fields)
    return read_inputs(message, manifest, max_bytes=100, capacity=16, capacity_name="max_model_len")


def test_without_a_source_the_input_is_the_prompt(manifest: Manifest) -> None:
    assert inputs_of(manifest, prompt="x") == Inputs(prompt=PromptText("x"))
    for fields, field in (({"image": b"x"}, "image"), ({"prompt": "x", "encoder_text": ""}, "encoder_text")):
        with pytest.raises(InvalidField, match="prompt") as refused:
            inputs_of(manifest, **fields)
        assert refused.value.field == field


def test_the_source_is_the_encoder_text_or_else_the_input(manifest: Manifest) -> None:
    reader = reading(manifest, Role.SOURCE_IDS)
    ids = pb.TokenIds(ids=[3, 1])
    assert inputs_of(reader, prompt="x") == Inputs(source=PromptText("x"), source_field="prompt")
    assert inputs_of(reader, token_ids=ids) == Inputs(source=PromptTokens((3, 1)), source_field="token_ids")
    alone = inputs_of(reader, encoder_text="x")
    assert alone == Inputs(source=PromptText("x"), source_field="encoder_text")
    assert inputs_of(reader, encoder_text="x", token_ids=ids) == replace(alone, prompt=PromptTokens((3, 1)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "input is None"),
        ({"encoder_text": ""}, "encoder_text is ''"),
        ({"encoder_text": "x" * 101}, "encoder_text is '101 bytes'"),
        ({"encoder_text": "x", "prompt": ""}, "prompt is ''"),
        ({"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="user")])}, "needs encoder_text"),
        ({"image": b"x"}, "image is '1 bytes'"),
        ({"token_ids": pb.TokenIds(ids=[1] * 10)}, "max_source_len"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_by_its_name(
    manifest: Manifest, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(AttendantError) as refused:
        inputs_of(reading(manifest, Role.SOURCE_IDS), **fields)
    assert said in refused.value.message


def test_a_bundle_that_writes_about_images_needs_one(manifest: Manifest) -> None:
    reader = reading(manifest, Role.IMAGE)
    assert inputs_of(reader, image=b"x") == Inputs(source=PromptImage(b"x"), source_field="image")
    for fields in ({"image": b""}, {"prompt": "x"}, {"image": b"x", "encoder_text": "x"}):
        with pytest.raises(InvalidField, match="image"):
            inputs_of(reader, **fields)


def test_a_beam_search_goes_by_twice_as_many_tokens_as_it_is_wide(manifest: Manifest) -> None:
    beam = pb.BeamSearch(width=4, length_penalty=0.0)
    message = pb.GenerateRequest(model="m", prompt="x", beam=beam, sampling=pb.SamplingParams(n=3, max_tokens=5))
    options = read_options(message, manifest)
    assert options.beam == Beam(width=4, length_penalty=0.0, num_answers=3)
    assert (options.logprobs, options.top_logprobs, options.max_tokens) == (True, 8, 5)
    with pytest.raises(InvalidField, match="at most 3 sequences"):
        check_width(options, 3)
    check_width(options, 4)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"beam": pb.BeamSearch()}, "beam.width"),
        ({"beam": pb.BeamSearch(width=33)}, "beam.width"),
        ({"beam": pb.BeamSearch(width=2, length_penalty=-0.1)}, "beam.length_penalty"),
        ({"beam": pb.BeamSearch(width=2, length_penalty=NAN)}, "beam.length_penalty"),
        ({"beam": pb.BeamSearch(width=2), "sampling": pb.SamplingParams(n=3)}, "sampling.n"),
        ({"beam": pb.BeamSearch(width=2), "sampling": pb.SamplingParams(n=0)}, "sampling.n"),
        ({"beam": pb.BeamSearch(width=2), "sampling": pb.SamplingParams(temperature=0.0)}, "sampling.temperature"),
        ({"beam": pb.BeamSearch(width=2), "sampling": pb.SamplingParams(min_tokens=1)}, "sampling.min_tokens"),
        ({"beam": pb.BeamSearch(width=2), "stop": pb.StopConditions(strings=["a"])}, "stop.strings"),
        ({"beam": pb.BeamSearch(width=2), "output": pb.OutputOptions(logprobs=True)}, "output.logprobs"),
        ({"sampling": pb.SamplingParams(n=2)}, "sampling.n"),
        ({"sampling": pb.SamplingParams(n=0)}, "sampling.n"),
    ],
)
def test_what_does_not_go_with_a_beam_search_is_refused(
    manifest: Manifest, fields: dict[str, object], field: str
) -> None:
    error = options_error(manifest, **fields)
    assert isinstance(error, InvalidField)
    assert error.field == field


def test_a_bundle_that_does_not_generate_is_refused(manifest: Manifest) -> None:
    embedder = manifest.model_copy(update={"tasks": ("embed",)})
    assert "does not generate" in options_error(embedder).message


@pytest.mark.parametrize("priority", [-101, 101])
def test_priority_is_bounded(manifest: Manifest, priority: int) -> None:
    error = options_error(manifest, priority=priority)
    assert isinstance(error, InvalidField)
    assert error.field == "priority"


@pytest.mark.parametrize("request_id", ["x" * 129, "tab\tbed", "näme", "new\nline"])
def test_request_ids_are_short_printable_ascii(manifest: Manifest, request_id: str) -> None:
    error = options_error(manifest, request_id=request_id)
    assert isinstance(error, InvalidField)
    assert error.field == "request_id"


def test_a_request_id_is_kept_and_an_absent_one_drawn(manifest: Manifest) -> None:
    def request_id(given: str) -> str:
        return read_options(pb.GenerateRequest(prompt="x", request_id=given), manifest).request_id

    assert request_id("mine: 1") == "mine: 1"
    assert request_id("") != request_id("") != ""


def test_eos_tokens_are_the_models_unless_ignored(manifest: Manifest) -> None:
    def eos(ignore: bool) -> frozenset[int]:
        message = pb.GenerateRequest(prompt="x", stop=pb.StopConditions(ignore_eos=ignore))
        return read_options(message, manifest).eos_token_ids

    assert manifest.vocabulary is not None
    assert eos(False) == frozenset(manifest.vocabulary.eos_token_ids)
    assert eos(True) == frozenset()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "input"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "ä" * 51}, "prompt"),
        ({"token_ids": pb.TokenIds()}, "token_ids.ids"),
        ({"messages": pb.ChatMessages()}, "messages.messages"),
        ({"messages": pb.ChatMessages(messages=[pb.ChatMessage(content="x")])}, "messages.messages[0].role"),
        (
            {"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * 97)])},
            "messages",
        ),
        ({"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="u")] * 17)}, "messages.messages"),
    ],
)
def test_a_prompt_that_is_missing_empty_or_too_large_is_refused(fields: dict[str, object], field: str) -> None:
    error = input_error(**fields)
    assert isinstance(error, InvalidField)
    assert error.field == field


def test_more_token_ids_than_the_context_holds_are_refused_before_they_are_looked_at() -> None:
    error = input_error(token_ids=pb.TokenIds(ids=[-1] * 16))
    assert isinstance(error, ContextLengthExceeded)
    assert error.metadata == {"prompt_tokens": "16", "max_tokens": "1", "max_model_len": "16"}


def test_each_kind_of_prompt_is_read() -> None:
    def read(**fields: object) -> object:
        return read_input(pb.GenerateRequest(**fields), max_bytes=100, capacity=16, capacity_name="max_model_len")

    assert read(prompt="ä" * 50) == PromptText("ä" * 50)
    assert read(token_ids=pb.TokenIds(ids=[3, 1])) == PromptTokens((3, 1))
    turn = pb.ChatMessage(role="user", content="")
    assert read(messages=pb.ChatMessages(messages=[turn])) == Conversation((("user", ""),))


@pytest.mark.parametrize("budget", [Duration(), Duration(seconds=-1), Duration(seconds=86_401)])
def test_a_latency_budget_out_of_range_is_refused(manifest: Manifest, budget: Duration) -> None:
    error = options_error(manifest, latency_budget=budget)
    assert isinstance(error, InvalidField) and error.field == "latency_budget"


@pytest.mark.parametrize(("deadline", "expected"), [(None, 6.5), (7.0, 6.5), (6.0, 6.0)])
def test_the_earlier_of_budget_and_deadline_counts(manifest: Manifest, deadline: float | None, expected: float) -> None:
    budget = Duration(seconds=1, nanos=500_000_000)
    options = read_options(pb.GenerateRequest(model="m", prompt="x", latency_budget=budget), manifest)
    request = to_request(options, (1,), engine_id="1", capacity=99, arrival=5.0, deadline=deadline)
    assert request.deadline == expected


def test_a_prompt_without_tokens_is_refused(manifest: Manifest) -> None:
    with pytest.raises(InvalidField, match="no tokens"):
        request_of(manifest, 0)
