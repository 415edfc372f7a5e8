"""A `GenerateRequest` to what the scheduler takes: every limit of the protos is kept here, every default resolved.

Reading has two halves, because tokenising lies between them: `read_options` and `read_inputs` look at the message alone
and are cheap; `to_request` knows how long the prompt is.
"""

import math
import re
import secrets
from dataclasses import dataclass
from typing import Any

from attendant.bundle import Manifest, Places, Vocabulary, WeightsSpec
from attendant.v1 import generation_pb2 as pb
from service.errors import ContextLengthExceeded, InvalidField, Unsupported
from service.rpc.sampling_fields import read_sampling
from service.rpc.urgency import read_budget, read_priority
from service.scheduling.request import Beam, Request, SamplingParams, Source

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_BEAM_WIDTH = 32
GREEDY = SamplingParams(temperature=0.0)

_WITH_BEAM = ("max_tokens", "n")

_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a request asks for, apart from its prompt; `max_tokens` is None if it is silent.

    A beam search goes by the `top_logprobs` of each step; `latency_budget` is in seconds.
    """

    request_id: str
    sampling: SamplingParams
    max_tokens: int | None
    min_tokens: int
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    logprobs: bool
    top_logprobs: int
    echo: bool
    alignment: bool
    priority: int
    beam: Beam | None
    latency_budget: float | None


@dataclass(frozen=True, slots=True)
class PromptText:
    """Text to tokenise as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Pairs of role and content to render and tokenise."""

    messages: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids to use as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptImage:
    """An encoded image."""

    content: bytes


Prompt = PromptText | Conversation | PromptTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What an answer is about, for a model that reads a source, and what it begins with, if the caller says so.

    `source_field` is where the source stood in the request.
    """

    source: PromptText | PromptTokens | PromptImage | None = None
    source_field: str = ""
    prompt: Prompt | None = None


def vocabulary_of(manifest: Manifest) -> Vocabulary:
    """Return the vocabulary of a bundle that works on text.

    Raises:
        Unsupported: it has none, or does not generate.
    """
    if "generate" not in manifest.tasks or manifest.vocabulary is None:
        raise Unsupported(f"model {manifest.key} does not generate text; its tasks: {', '.join(manifest.tasks)}")
    return manifest.vocabulary


def read_options(message: pb.GenerateRequest, manifest: Manifest) -> Options:
    """Check everything but the prompt.

    Raises:
        InvalidField: a field is out of range or contradicts another.
        Unsupported: the API declares it, this build does not do it.
    """
    vocabulary = vocabulary_of(manifest)
    sampling, stop, output = message.sampling, message.stop, message.output
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else None
    if max_tokens is not None and max_tokens < 1:
        raise InvalidField("sampling.max_tokens", max_tokens, "must be at least 1")
    if sampling.min_tokens < 0:
        raise InvalidField("sampling.min_tokens", sampling.min_tokens, "must be at least 0")
    if not 0 <= output.top_logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidField("output.top_logprobs", output.top_logprobs, f"must be in [0, {MAX_TOP_LOGPROBS}]")
    if output.top_logprobs > vocabulary.size:
        raise InvalidField("output.top_logprobs", output.top_logprobs, f"the model has {vocabulary.size} tokens")
    if output.top_logprobs and not output.logprobs:
        raise InvalidField("output.top_logprobs", output.top_logprobs, "needs output.logprobs")
    if output.alignment and not any(spec.rows is Places.WRITTEN for spec in _weights(manifest)):
        raise Unsupported(f"output.alignment: model {manifest.key} has no explain graph with attention to a source")
    if message.request_id and not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidField("request_id", message.request_id, "must be 1 to 128 printable ASCII characters")
    beam = read_beam(message) if message.HasField("beam") else None
    if beam is None and sampling.HasField("n") and sampling.n != 1:
        raise InvalidField("sampling.n", sampling.n, "must be 1, or at most the width of a beam search")
    return Options(
        request_id=message.request_id or secrets.token_hex(8),
        sampling=read_sampling(sampling, manifest.sampling_defaults, vocabulary.size) if beam is None else GREEDY,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_strings=_read_stop_strings(stop),
        stop_token_ids=_read_stop_token_ids(stop, vocabulary.size),
        eos_token_ids=frozenset() if stop.ignore_eos else frozenset(vocabulary.eos_token_ids),
        logprobs=output.logprobs or beam is not None,
        top_logprobs=output.top_logprobs if beam is None else min(2 * beam.width, vocabulary.size),
        echo=output.echo,
        alignment=output.alignment,
        priority=read_priority(message),
        beam=beam,
        latency_budget=read_budget(message),
    )


def check_width(options: Options, num_slots: int) -> None:
    """Raise InvalidField if a beam search needs more sequences at once than `num_slots`."""
    if options.beam is not None and options.beam.width > num_slots:
        raise InvalidField("beam.width", options.beam.width, f"this server runs at most {num_slots} sequences at once")


def read_beam(message: pb.GenerateRequest) -> Beam:
    """Check a beam search; see `read_options`."""
    width = message.beam.width
    if not 1 <= width <= MAX_BEAM_WIDTH:
        raise InvalidField("beam.width", width, f"must be in [1, {MAX_BEAM_WIDTH}]")
    penalty = message.beam.length_penalty if message.beam.HasField("length_penalty") else 1.0
    if not 0 <= penalty <= 10:  # NaN is in no range
        raise InvalidField("beam.length_penalty", penalty, "must be in [0, 10]")
    num_answers = message.sampling.n if message.sampling.HasField("n") else 1
    if not 1 <= num_answers <= width:
        raise InvalidField("sampling.n", num_answers, f"must be in [1, {width}], the width of the beam search")
    given = [f"sampling.{field.name}" for field, _ in message.sampling.ListFields() if field.name not in _WITH_BEAM]
    given += [f"output.{field.name}" for field, _ in message.output.ListFields()]
    given += ["stop.strings"] if message.stop.strings else []
    if given:
        raise InvalidField(given[0], "set", "must be absent with beam: a search does not choose token by token")
    return Beam(width=width, length_penalty=penalty, num_answers=num_answers)


def read_inputs(message: pb.GenerateRequest, manifest: Manifest, **limits: Any) -> Inputs:
    """Tell source and prompt apart, and check both before anything works on them.

    Args:
        message: the request.
        manifest: says what the bundle writes about.
        limits: those of `read_input`.

    Raises:
        InvalidField: something is missing, empty, too large, or not what the bundle reads.
        Unsupported: the API declares it, this build does not do it.
        ContextLengthExceeded: there are more token ids than fit.
    """
    kind, reads = message.WhichOneof("input"), manifest.source
    if kind == "audio":
        raise Unsupported("audio: this build takes text, token ids and images only", {"field": "audio"})
    if message.HasField("encoder_text") and reads != "text":
        raise InvalidField(
            "encoder_text", message.encoder_text, f"model {manifest.key} reads {reads or 'a prompt'} only"
        )
    if (kind == "image") != (reads == "image"):
        shown = f"{len(message.image)} bytes" if kind == "image" else kind
        needs = {"image": "image", "text": "encoder_text, prompt or token_ids", None: "prompt, messages or token_ids"}
        raise InvalidField("image" if kind == "image" else "input", shown, f"model {manifest.key} needs {needs[reads]}")
    if kind == "image":
        if not message.image:
            raise InvalidField("image", "0 bytes", "must not be empty")
        return Inputs(source=PromptImage(message.image), source_field="image")
    if reads is None:
        return Inputs(prompt=read_input(message, **limits))
    if message.HasField("encoder_text"):
        check_bytes("encoder_text", limits["max_bytes"], message.encoder_text)
        if not message.encoder_text:
            raise InvalidField("encoder_text", "", "must not be empty")
        prompt = None if kind is None else read_input(message, **limits)
        return Inputs(source=PromptText(message.encoder_text), source_field="encoder_text", prompt=prompt)
    if kind == "messages":
        raise InvalidField("input", kind, f"model {manifest.key} needs encoder_text, prompt or token_ids")
    source_limits = {"capacity": (manifest.limits.max_source_len or 0) + 1, "capacity_name": "max_source_len"}
    source = read_input(message, **(limits | source_limits))
    assert not isinstance(source, Conversation), "refused above"
    return Inputs(source=source, source_field="prompt" if kind == "prompt" else "token_ids", prompt=None)


def read_input(message: pb.GenerateRequest, *, max_bytes: int, capacity: int, capacity_name: str) -> Prompt:
    """Check the prompt before anything works on it.

    Args:
        message: the request.
        max_bytes: of text.
        capacity: most tokens of prompt and answer together.
        capacity_name: what sets that limit.

    Raises:
        InvalidField: it is missing, empty or too large.
        ContextLengthExceeded: there are more token ids than fit.
    """
    kind = message.WhichOneof("input")
    if kind == "prompt":
        check_bytes("prompt", max_bytes, message.prompt)
        if not message.prompt:
            raise InvalidField("prompt", "", "must not be empty")
        return PromptText(message.prompt)
    if kind == "messages":
        return read_conversation(message.messages, max_bytes=max_bytes, capacity=capacity)
    if kind == "token_ids":
        count = len(message.token_ids.ids)
        if count == 0:
            raise InvalidField("token_ids.ids", [], "must not be empty")
        if count >= capacity:
            raise ContextLengthExceeded(
                prompt_tokens=count,
                max_tokens=max(1, message.sampling.max_tokens),
                limit=capacity,
                limit_name=capacity_name,
            )
        return PromptTokens(tuple(message.token_ids.ids))
    raise InvalidField("input", kind, "one of prompt, messages, token_ids is needed")


def read_conversation(messages: pb.ChatMessages, *, max_bytes: int, capacity: int) -> Conversation:
    """Check a conversation before it is rendered; see `read_input`."""
    turns = tuple((turn.role, turn.content) for turn in messages.messages)
    if not turns:
        raise InvalidField("messages.messages", [], "must not be empty")
    if len(turns) > capacity:
        raise InvalidField(
            "messages.messages", f"{len(turns)} messages", f"more than the context has tokens, {capacity}"
        )
    for i, (role, _) in enumerate(turns):
        if not role:
            raise InvalidField(f"messages.messages[{i}].role", role, "must not be empty")
    check_bytes("messages", max_bytes, *(text for turn in turns for text in turn))
    return Conversation(turns)


def check_bytes(field: str, limit: int, *texts: str) -> None:
    """Raise InvalidField if texts have more bytes in all than `limit`."""
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes > limit:
        raise InvalidField(field, f"{num_bytes} bytes", f"at most {limit} bytes of text")


def to_request(
    options: Options,
    prompt: tuple[int, ...],
    *,
    engine_id: str,
    capacity: int,
    arrival: float,
    deadline: float | None,
    source: Source | None = None,
    tenant: str = "",
) -> Request:
    """Resolve what depends on the prompt's length.

    Args:
        options: what was read.
        prompt: the tokens.
        engine_id: unique among the requests of one engine; a caller's own id need not be.
        capacity: most tokens of prompt and answer together.
        arrival: when the request came, in seconds of the engine's clock.
        deadline: when its caller gives up, on the same clock.
        source: what the answer is about, if the model reads a source.
        tenant: among whom the engine's time is shared.

    Raises:
        InvalidField: the prompt has no tokens, or min_tokens exceeds max_tokens.
    """
    if not prompt:
        raise InvalidField("input", "", "it has no tokens")
    room = max(1, capacity - len(prompt))  # whether it fits at all, the engine says
    max_tokens = min(DEFAULT_MAX_TOKENS, room) if options.max_tokens is None else options.max_tokens
    if options.min_tokens > max_tokens:
        raise InvalidField(
            "sampling.min_tokens", options.min_tokens, f"must be at most sampling.max_tokens, here {max_tokens}"
        )
    if options.latency_budget is not None:
        deadline = min(arrival + options.latency_budget, math.inf if deadline is None else deadline)
    return Request(
        request_id=engine_id,
        prompt=prompt,
        source=source,
        max_tokens=max_tokens,
        min_tokens=options.min_tokens,
        sampling=options.sampling,
        eos_token_ids=options.eos_token_ids,
        stop_token_ids=options.stop_token_ids,
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        beam=options.beam,
        priority=options.priority,
        tenant=tenant,
        arrival=arrival,
        deadline=deadline,
    )


def _weights(manifest: Manifest) -> tuple[WeightsSpec, ...]:
    return () if manifest.explain is None else manifest.explain.weights


def _read_stop_strings(stop: pb.StopConditions) -> tuple[str, ...]:
    if len(stop.strings) > MAX_STOP_STRINGS:
        raise InvalidField("stop.strings", f"{len(stop.strings)} strings", f"at most {MAX_STOP_STRINGS}")
    for i, string in enumerate(stop.strings):
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARACTERS:
            raise InvalidField(f"stop.strings[{i}]", string, f"must have 1 to {MAX_STOP_STRING_CHARACTERS} characters")
    return tuple(stop.strings)


def _read_stop_token_ids(stop: pb.StopConditions, vocab_size: int) -> frozenset[int]:
    if len(stop.token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidField("stop.token_ids", f"{len(stop.token_ids)} ids", f"at most {MAX_STOP_TOKEN_IDS}")
    for i, token_id in enumerate(stop.token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidField(f"stop.token_ids[{i}]", token_id, f"token ids go from 0 to {vocab_size - 1}")
    return frozenset(stop.token_ids)
