"""A `GenerateRequest` to what the scheduler takes: every limit of the protos is kept here, every default resolved.

Reading has two halves, because tokenising lies between them: `read_options` and `read_input` look at the message alone
and are cheap; `to_request` knows how long the prompt is.
"""

import re
import secrets
from dataclasses import dataclass

from attendant.bundle import Manifest, Vocabulary
from attendant.v1 import generation_pb2 as pb
from service.errors import ContextLengthExceeded, InvalidField, Unsupported
from service.rpc.sampling_fields import read_sampling
from service.scheduling.request import Request, SamplingParams

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20

_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a request asks for, apart from its prompt; `max_tokens` is None if it is silent."""

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
    priority: int


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


Prompt = PromptText | Conversation | PromptTokens


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
    _refuse_unbuilt(message)
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
    if not -100 <= message.priority <= 100:
        raise InvalidField("priority", message.priority, "must be in [-100, 100]")
    if message.request_id and not _REQUEST_ID.fullmatch(message.request_id):
        raise InvalidField("request_id", message.request_id, "must be 1 to 128 printable ASCII characters")
    return Options(
        request_id=message.request_id or secrets.token_hex(8),
        sampling=read_sampling(sampling, manifest.sampling_defaults, vocabulary.size),
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_strings=_read_stop_strings(stop),
        stop_token_ids=_read_stop_token_ids(stop, vocabulary.size),
        eos_token_ids=frozenset() if stop.ignore_eos else frozenset(vocabulary.eos_token_ids),
        logprobs=output.logprobs,
        top_logprobs=output.top_logprobs,
        echo=output.echo,
        priority=message.priority,
    )


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
) -> Request:
    """Resolve what depends on the prompt's length.

    Args:
        options: what was read.
        prompt: the tokens.
        engine_id: unique among the requests of one engine; a caller's own id need not be.
        capacity: most tokens of prompt and answer together.
        arrival: when the request came, in seconds of the engine's clock.
        deadline: when its caller gives up, on the same clock.

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
    return Request(
        request_id=engine_id,
        prompt=prompt,
        max_tokens=max_tokens,
        min_tokens=options.min_tokens,
        sampling=options.sampling,
        eos_token_ids=options.eos_token_ids,
        stop_token_ids=options.stop_token_ids,
        logprobs=options.logprobs,
        top_logprobs=options.top_logprobs,
        priority=options.priority,
        arrival=arrival,
        deadline=deadline,
    )


def _refuse_unbuilt(message: pb.GenerateRequest) -> None:
    if (kind := message.WhichOneof("input")) in ("image", "audio"):
        raise Unsupported(f"{kind}: this build takes text and token ids only", {"field": kind})
    for field in ("encoder_text", "latency_budget"):
        if message.HasField(field):
            raise Unsupported(f"{field}: not served by this build", {"field": field})
    count = message.sampling.n if message.sampling.HasField("n") else 1
    if count < 1:
        raise InvalidField("sampling.n", count, "must be at least 1")
    if count > 1:
        raise Unsupported(f"sampling.n is {count}: this build gives one answer", {"field": "sampling.n"})


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
