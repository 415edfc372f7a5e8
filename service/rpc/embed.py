"""An `EmbedRequest` to texts of token ids, and vectors to its response: every limit of the proto is kept here."""

from collections.abc import Sequence
from dataclasses import dataclass

from attendant.bundle import Embedding, Manifest
from attendant.v1 import embedding_pb2 as pb
from attendant.v1 import generation_pb2
from service.encode_loop import EncodeCall
from service.engine.pooling import Pooling, VectorOptions
from service.errors import InvalidField, TextTooLong
from service.rpc.convert import check_bytes
from service.rpc.status import to_duration
from service.text import TextCodec

MAX_INPUTS = 256

_POOLINGS: dict[int, Pooling] = {
    pb.POOLING_MEAN: "mean",
    pb.POOLING_CLS: "cls",
    pb.POOLING_MAX: "max",
    pb.POOLING_LAST: "last",
}


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The token ids of one input, and whether some were cut off."""

    token_ids: tuple[int, ...]
    truncated: bool


def read_options(request: pb.EmbedRequest, embedding: Embedding) -> VectorOptions:
    """Return how vectors are to be made; where the request is silent the bundle decides.

    Raises:
        InvalidField: a field is out of range.
    """
    if request.pooling not in (pb.POOLING_UNSPECIFIED, *_POOLINGS):
        names = ", ".join(name.removeprefix("POOLING_").lower() for name in list(pb.Pooling.keys())[1:])
        raise InvalidField("pooling", request.pooling, f"must be one of {names}")
    dimensions = request.dimensions if request.HasField("dimensions") else None
    if dimensions is not None and not 1 <= dimensions <= embedding.width:
        raise InvalidField("dimensions", dimensions, f"must be in [1, {embedding.width}], the vectors' width")
    return VectorOptions(
        pooling=_POOLINGS.get(request.pooling, embedding.pooling),
        normalize=request.normalize if request.HasField("normalize") else embedding.normalize,
        dimensions=dimensions,
    )


def check_inputs(request: pb.EmbedRequest, max_bytes: int) -> None:
    """Check number and size of the inputs before anything works on them.

    Raises:
        InvalidField: there are none or too many, one is empty, or they have more bytes of text than `max_bytes`.
    """
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise InvalidField("inputs", f"{len(request.inputs)} inputs", f"1 to {MAX_INPUTS} are needed")
    for index, item in enumerate(request.inputs):
        kind = item.WhichOneof("input")
        if kind is None:
            raise InvalidField(f"inputs[{index}].input", kind, "one of text, token_ids is needed")
        if kind == "text" and not item.text:
            raise InvalidField(f"inputs[{index}].text", "", "must not be empty")
        if kind == "token_ids" and not item.token_ids.ids:
            raise InvalidField(f"inputs[{index}].token_ids.ids", [], "must not be empty")
    check_bytes("inputs", max_bytes, *(item.text for item in request.inputs))


def encode_inputs(request: pb.EmbedRequest, codec: TextCodec, capacity: int) -> list[EncodedText]:
    """Tokenise the inputs; runs in a thread.

    Raises:
        InvalidField: a token id is not of the vocabulary.
        TextTooLong: an input has more tokens than `capacity`, and `truncate` is not set.
    """
    return [_encode(item, index, request.truncate, codec, capacity) for index, item in enumerate(request.inputs)]


def _encode(item: pb.EmbedInput, index: int, truncate: bool, codec: TextCodec, capacity: int) -> EncodedText:
    is_text = item.WhichOneof("input") == "text"
    token_ids = codec.encode_prompt(item.text) if is_text else tuple(item.token_ids.ids)
    if not is_text:
        codec.check_ids(token_ids, f"inputs[{index}].token_ids.ids")
    if not token_ids:
        raise InvalidField(f"inputs[{index}].text", item.text, "has no tokens")
    if len(token_ids) <= capacity:
        return EncodedText(token_ids, False)
    if truncate:  # of a text the special token at its end stays
        return EncodedText(codec.encode_truncated(item.text, capacity) if is_text else token_ids[:capacity], True)
    raise TextTooLong(field=f"inputs[{index}]", tokens=len(token_ids), limit=capacity)


def to_response(
    manifest: Manifest, texts: Sequence[EncodedText], call: EncodeCall, tokenise_seconds: float
) -> pb.EmbedResponse:
    """Return the vectors of a finished call."""
    embeddings = []
    for text, vector in zip(texts, call.vectors, strict=True):
        assert vector is not None, "the call is finished"
        embeddings.append(pb.Embedding(values=vector, tokens=len(text.token_ids), truncated=text.truncated))
    started = call.ended if call.started is None else call.started
    return pb.EmbedResponse(
        embeddings=embeddings,
        model=manifest.key,
        usage=generation_pb2.Usage(prompt_tokens=sum(len(text.token_ids) for text in texts)),
        timings=generation_pb2.Timings(
            queue=to_duration(started - call.arrival - tokenise_seconds),
            tokenise=to_duration(tokenise_seconds),
            prefill=to_duration(call.ended - started),
            total=to_duration(call.ended - call.arrival),
        ),
    )
