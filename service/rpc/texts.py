"""What requests about texts have in common: their number, their size, their length in tokens, what was counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attendant.v1 import generation_pb2
from service.encode_loop import EncodeCall
from service.engine.encode_graph import Item
from service.errors import InvalidField, TextTooLong
from service.rpc.status import to_duration
from service.text import EncodedText, TextCodec

MAX_INPUTS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a text: `tokens` by the model, and whether longer ones are cut."""

    tokens: int
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input as the graph takes it, and the text that it was, if it was one."""

    item: Item
    text: EncodedText | None = None

    @property
    def truncated(self) -> bool:
        """Whether a text was cut."""
        return self.text is not None and self.text.truncated


def check_number(field: str, values: Sequence[object]) -> None:
    """Raise InvalidField unless there are 1 to `MAX_INPUTS` values."""
    if not 1 <= len(values) <= MAX_INPUTS:
        raise InvalidField(field, f"{len(values)} {field.rpartition('.')[2]}", f"1 to {MAX_INPUTS} are needed")


def check_text(field: str, text: str) -> None:
    """Raise InvalidField if a text is empty."""
    if not text:
        raise InvalidField(field, text, "must not be empty")


def check_choice(field: str, item: Any, kinds: Sequence[str]) -> str:
    """Return which of `kinds` an input is.

    Raises:
        InvalidField: it is none of them, or an empty text or list of token ids.
    """
    kind: str | None = item.WhichOneof("input")
    if kind is None or kind not in kinds:
        raise InvalidField(f"{field}.input", kind, f"one of {', '.join(kinds)} is needed")
    if kind == "text":
        check_text(f"{field}.text", item.text)
    if kind == "token_ids" and not item.token_ids.ids:
        raise InvalidField(f"{field}.token_ids.ids", [], "must not be empty")
    return kind


def read_text(field: str, codec: TextCodec, limits: Limits, text: str, pair: str | None = None) -> EncodedText:
    """Tokenise a text or a pair of texts.

    Raises:
        InvalidField: it has no tokens.
        TextTooLong: it has more tokens than may be, and must not be cut.
    """
    encoded = codec.encode_text(text, pair)
    if not encoded.token_ids:
        raise InvalidField(field, text, "has no tokens")
    if len(encoded.token_ids) <= limits.tokens:
        return encoded
    if not limits.truncate:
        raise TextTooLong(field=field, tokens=len(encoded.token_ids), limit=limits.tokens)
    return codec.encode_text(text, pair, max_tokens=limits.tokens)


def read_token_ids(field: str, codec: TextCodec, limits: Limits, token_ids: Sequence[int]) -> EncodedText:
    """Check token ids that a caller has chosen.

    Raises:
        InvalidField: an id is not of the vocabulary.
        TextTooLong: there are more than may be, and they must not be cut.
    """
    codec.check_ids(token_ids, f"{field}.token_ids.ids")
    encoded = EncodedText.of_ids(tuple(token_ids))
    if len(token_ids) <= limits.tokens:
        return encoded
    if not limits.truncate:
        raise TextTooLong(field=field, tokens=len(token_ids), limit=limits.tokens)
    return encoded.cut(limits.tokens)


def read_single(field: str, codec: TextCodec, limits: Limits, item: Any) -> EncodedText:
    """Read an input that is a text or token ids; errors are those of `read_text` and `read_token_ids`."""
    if item.WhichOneof("input") == "text":
        return read_text(field, codec, limits, item.text)
    return read_token_ids(field, codec, limits, item.token_ids.ids)


def input_of(text: EncodedText, places: Sequence[int] = ()) -> Input:
    """Return a text as the graph takes it."""
    item = Item(
        length=len(text.token_ids), token_ids=text.token_ids, segment_ids=text.segment_ids, places=tuple(places)
    )
    return Input(item=item, text=text)


def usage_of(inputs: Sequence[Input]) -> generation_pb2.Usage:
    """Return the token counts of all inputs together."""
    return generation_pb2.Usage(prompt_tokens=sum(each.item.length for each in inputs))


def timings_of(call: EncodeCall[Any], tokenise_seconds: float) -> generation_pb2.Timings:
    """Return where the time of a finished call went."""
    started = call.ended if call.started is None else call.started
    return generation_pb2.Timings(
        queue=to_duration(started - call.arrival - tokenise_seconds),
        tokenise=to_duration(tokenise_seconds),
        prefill=to_duration(call.ended - started),
        total=to_duration(call.ended - call.arrival),
    )
