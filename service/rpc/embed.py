"""An `EmbedRequest` to texts of token ids, and vectors to its response: every limit of the proto is kept here."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Manifest
from attendant.v1 import embedding_pb2 as pb
from service.engine.pooling import Pooling, VectorOptions, pool
from service.errors import InvalidField
from service.rpc.convert import check_bytes
from service.rpc.encode_task import Answer, EncodeTask, Finish, Reading
from service.rpc.texts import Input, Limits, check_choice, check_number, input_of, read_single

Vector = NDArray[np.float32]

_POOLINGS: dict[int, Pooling] = {
    pb.POOLING_MEAN: "mean",
    pb.POOLING_CLS: "cls",
    pb.POOLING_MAX: "max",
    pb.POOLING_LAST: "last",
}


def _check(request: pb.EmbedRequest, manifest: Manifest, max_bytes: int) -> Finish[Vector]:
    options = read_options(request, manifest)
    check_number("inputs", request.inputs)
    for index, item in enumerate(request.inputs):
        check_choice(f"inputs[{index}]", item, ("text", "token_ids"))
    check_bytes("inputs", max_bytes, *(item.text for item in request.inputs))
    return lambda vectors: pool(vectors, options)


def read_options(request: pb.EmbedRequest, manifest: Manifest) -> VectorOptions:
    """Return how vectors are to be made; where the request is silent the bundle decides.

    Raises:
        InvalidField: a field is out of range.
    """
    embedding = manifest.embedding
    assert embedding is not None, "the schema demands it of an embedding bundle"
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


def _read(request: pb.EmbedRequest, reading: Reading) -> list[Input]:
    limits = Limits(tokens=reading.capacity, truncate=request.truncate)
    return [
        input_of(read_single(f"inputs[{index}]", reading.codec, limits, item))
        for index, item in enumerate(request.inputs)
    ]


def _respond(request: pb.EmbedRequest, inputs: Sequence[Input], answer: Answer[Vector]) -> pb.EmbedResponse:
    embeddings = [
        pb.Embedding(values=vector.tolist(), tokens=each.item.length, truncated=each.truncated)
        for each, vector in zip(inputs, answer.results, strict=True)
    ]
    return pb.EmbedResponse(embeddings=embeddings, model=answer.model, usage=answer.usage, timings=answer.timings)


EMBED = EncodeTask(name="embed", check=_check, read=_read, respond=_respond)
