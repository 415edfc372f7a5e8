"""Arguments to request messages, response messages to values: the part that both clients share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypedDict, cast

import grpc
from google.protobuf.duration_pb2 import Duration

from attendant._errors import ServerError
from attendant._types import (
    Check,
    Delta,
    Event,
    Finished,
    FinishReason,
    Generation,
    Message,
    Model,
    ModelState,
    Started,
    Timings,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Turn,
    Usage,
)
from attendant.v1 import generation_pb2 as pb
from attendant.v1 import inference_service_pb2 as inference_pb
from attendant.v1 import model_service_pb2 as model_pb


class GenerateOptions(TypedDict, total=False):
    """How to generate; what is absent or None is left to the model. Meanings and limits: generation.proto."""

    encoder_text: str | None
    """The source text, where the prompt is what the answer begins with."""
    beam_width: int | None
    """Search for the most likely answers; `n` of them are returned."""
    length_penalty: float | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    echo: bool | None
    alignment: bool | None
    priority: int | None
    latency_budget: float | None
    """Seconds within which the whole answer is wanted."""
    request_id: str | None


# Which message of the request an option is a field of, and under what name.
_PLACES: Final[dict[str, tuple[str, str]]] = {
    **{
        name: ("sampling", name)
        for name in (
            "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
            "presence_penalty", "frequency_penalty", "logit_bias", "seed", "n",
        )
    },
    "stop": ("stop", "strings"),
    "stop_token_ids": ("stop", "token_ids"),
    "ignore_eos": ("stop", "ignore_eos"),
    **{name: ("output", name) for name in ("logprobs", "top_logprobs", "echo", "alignment")},
    **{name: ("", name) for name in ("encoder_text", "priority", "latency_budget", "request_id")},
    "beam_width": ("beam", "width"),
    "length_penalty": ("beam", "length_penalty"),
}  # fmt: skip


def generate_request(
    model: str,
    prompt: str | None,
    messages: Iterable[Turn] | None,
    token_ids: Iterable[int] | None,
    image: bytes | None,
    options: GenerateOptions,
) -> pb.GenerateRequest:
    """Return the request.

    Raises:
        TypeError: an option has no such name, or a value is of the wrong type.
        ValueError: not exactly one input is given, or a value does not fit its field.
    """
    given = sum(value is not None for value in (prompt, messages, token_ids, image))
    if given > 1 or (given == 0 and options.get("encoder_text") is None):
        raise ValueError("give exactly one of prompt, messages, token_ids and image, or encoder_text alone")
    request = pb.GenerateRequest(model=model)
    if image is not None:
        set_field(request, "image", image)
    if prompt is not None:
        set_field(request, "prompt", prompt)
    if messages is not None:
        request.messages.CopyFrom(chat_messages(messages))
    if token_ids is not None:
        request.token_ids.SetInParent()
        set_field(request.token_ids, "ids", token_ids, "token_ids")
    for name, value in cast(Mapping[str, Any], options).items():
        if name not in _PLACES:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(_PLACES)}")
        if value is not None:
            where, field = _PLACES[name]
            set_field(getattr(request, where) if where else request, field, wire_value(name, value), name)
    return request


def chat_messages(messages: Iterable[Turn]) -> pb.ChatMessages:
    """Return a conversation as a message."""
    result = pb.ChatMessages()
    for i, turn in enumerate(messages):
        match turn:
            case Message(role, content) | (str() as role, str() as content):
                result.messages.add(role=role, content=content)
            case {"role": str() as role, "content": str() as content} if len(turn) == 2:
                result.messages.add(role=role, content=content)
            case _:
                raise TypeError(f"messages[{i}] is {turn!r}: a Message, (role, content) or a mapping of just these")
    return result


def tokenize_request(
    model: str, text: str | None, messages: Iterable[Turn] | None, add_special_tokens: bool | None
) -> inference_pb.TokenizeRequest:
    """Return the request; exactly one of text and messages is given."""
    if (text is None) == (messages is None):
        raise ValueError("give exactly one of text and messages")
    request = inference_pb.TokenizeRequest(model=model, add_special_tokens=add_special_tokens)
    if text is not None:
        set_field(request, "text", text)
    if messages is not None:
        request.messages.CopyFrom(chat_messages(messages))
    return request


def detokenize_request(
    model: str, token_ids: Iterable[int], skip_special_tokens: bool | None
) -> inference_pb.DetokenizeRequest:
    """Return the request."""
    request = inference_pb.DetokenizeRequest(model=model, skip_special_tokens=skip_special_tokens)
    set_field(request, "token_ids", token_ids)
    return request


def tokens(response: inference_pb.TokenizeResponse) -> Tokens:
    """Return the answer to a TokenizeRequest."""
    return Tokens(token_ids=tuple(response.token_ids), tokens=tuple(response.tokens), text=response.text)


class Answer:
    """What has come of one answer; both clients' streams are views of it."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.deltas: list[Delta] = []
        self.finishes: dict[int, Finished] = {}

    def add(self, response: pb.GenerateResponse) -> Event | None:
        """Take the next response and return its event; None for one that this client is too old to know."""
        match _event(response):
            case Started() as event:
                self.started = event
                return event
            case Delta() as event:
                self.deltas.append(event)
                return event
            case Finished() as event:
                self.finishes[event.index] = event
                return event
        return None

    @property
    def finished(self) -> Finished | None:
        """How the first answer ended, once it has."""
        return self.finishes.get(0)

    @property
    def text(self) -> str:
        """The text of the first answer so far."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)

    def check_finished(self) -> None:
        """Raise ServerError if the stream is over and the answer is not."""
        if self.started is None or self.finished is None:
            raise ServerError("the answer broke off without an error", code=grpc.StatusCode.INTERNAL)

    def whole(self) -> Generation:
        """Return the answer, once it is finished."""
        self.check_finished()
        return self._generation(0, tuple(self._generation(index) for index in sorted(self.finishes) if index))

    def _generation(self, index: int, others: tuple[Generation, ...] = ()) -> Generation:
        assert self.started is not None
        deltas = [delta for delta in self.deltas if delta.index == index]
        return Generation(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            alignment=tuple(weights for delta in deltas for weights in delta.alignment),
            started=self.started,
            finished=self.finishes[index],
            others=others,
        )


def _event(response: pb.GenerateResponse) -> Event | None:
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                request_id=started.request_id,
                model=started.model,
                prompt_tokens=started.prompt_tokens,
                seed=started.seed,
                source_labels=tuple(started.source_labels),
            )
        case "delta":
            delta = response.delta
            return Delta(
                text=delta.text,
                token_ids=tuple(delta.token_ids),
                logprobs=tuple(map(_logprob, delta.logprobs)),
                index=delta.index,
                alignment=tuple(tuple(token.weights) for token in delta.alignment),
            )
        case "finished":
            return _finished(response.finished)
    return None


def _logprob(logprob: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(TopLogprob(other.token_id, other.logprob) for other in logprob.top)
    return TokenLogprob(logprob.token_id, logprob.logprob, top)


def _finished(finished: pb.Finished) -> Finished:
    return Finished(
        finish_reason=cast(FinishReason, _enum_name(pb.FinishReason.Name, finished.finish_reason, "FINISH_REASON_")),
        usage=usage_of(finished.usage),
        timings=timings_of(finished.timings),
        index=finished.index,
        score=finished.score if finished.HasField("score") else None,
        log_likelihood=finished.log_likelihood if finished.HasField("log_likelihood") else None,
    )


def usage_of(usage: pb.Usage) -> Usage:
    """Return token counts."""
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.output_tokens,
    )


def timings_of(timings: pb.Timings) -> Timings:
    """Return where the time went."""
    return Timings(
        queue_seconds=_seconds(timings.queue),
        tokenise_seconds=_seconds(timings.tokenise),
        prefill_seconds=_seconds(timings.prefill),
        decode_seconds=_seconds(timings.decode),
        total_seconds=_seconds(timings.total),
    )


def model(message: model_pb.Model) -> Model:
    """Return the description of a model."""
    return Model(
        name=message.name,
        version=message.version,
        state=cast(ModelState, _enum_name(model_pb.ModelState.Name, message.state, "MODEL_STATE_")),
        reason=message.reason,
        family=message.family,
        tasks=tuple(message.tasks),
        precision=message.precision,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        has_chat_template=message.has_chat_template,
        bundle_sha256=message.bundle_sha256,
        source=message.source,
        licence=message.licence,
        load_seconds=message.load_seconds,
        checks=tuple(
            Check(name=check.name, measured=check.measured, bound=check.bound, grid=check.grid)
            for check in message.checks
        ),
        reads=message.reads,
        max_source_len=message.max_source_len,
        labels=tuple(message.labels),
        image_shape=tuple(message.image_shape),
    )


def set_field(message: Any, field: str, value: Any, name: str | None = None) -> None:
    """Set a field, so that an error names the argument and not only what was wrong with its value."""
    try:
        current = getattr(message, field)
        if hasattr(current, "extend"):
            current.extend(value)
        elif hasattr(current, "update"):
            current.update(value)
        elif hasattr(current, "CopyFrom"):
            current.CopyFrom(value)
        else:
            setattr(message, field, value)
    except TypeError as error:
        raise TypeError(f"{name or field}: {error}") from None
    except ValueError as error:  # of any kind: text that is not Unicode is one too
        raise ValueError(f"{name or field}: {error}") from None


def wire_value(name: str, value: Any) -> Any:
    """Return the value of an option as its field takes it."""
    if name == "stop" and isinstance(value, str):
        return (value,)
    return _duration(value) if name == "latency_budget" else value


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _enum_name(name: Callable[[Any], str], value: int, prefix: str) -> str:
    try:
        return name(value).removeprefix(prefix).lower()
    except ValueError:  # a newer server's
        return "unspecified"
