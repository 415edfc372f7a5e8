"""A `ScoreRequest` to pairs of texts, and one logit of each to its response: every limit of the proto is kept here."""

from collections.abc import Sequence

import numpy as np

from attendant.bundle import Manifest
from attendant.v1 import scoring_pb2 as pb
from service.engine.finishing import sigmoid
from service.errors import InvalidField
from service.rpc.convert import check_bytes
from service.rpc.encode_task import Answer, EncodeTask, Finish, Reading
from service.rpc.texts import Input, Limits, check_number, check_text, input_of, read_text


def _check(request: pb.ScoreRequest, manifest: Manifest, max_bytes: int) -> Finish[np.float32]:
    if request.WhichOneof("input") != "relevance":
        raise InvalidField("input", None, "relevance is needed")
    check_text("relevance.query", request.relevance.query)
    check_number("relevance.texts", request.relevance.texts)
    for index, text in enumerate(request.relevance.texts):
        check_text(f"relevance.texts[{index}]", text)
    # The query counts with every text, because it is read with every text.
    check_bytes("relevance", max_bytes, *(request.relevance.query + text for text in request.relevance.texts))
    return lambda logits: logits[0]


def _read(request: pb.ScoreRequest, reading: Reading) -> list[Input]:
    limits = Limits(tokens=reading.capacity, truncate=request.truncate)
    return [
        input_of(read_text(f"relevance.texts[{index}]", reading.codec, limits, request.relevance.query, text))
        for index, text in enumerate(request.relevance.texts)
    ]


def _respond(request: pb.ScoreRequest, inputs: Sequence[Input], answer: Answer[np.float32]) -> pb.ScoreResponse:
    values = np.array(answer.results, np.float32)
    scores = [
        pb.TextScore(score=score, probability=probability, tokens=each.item.length, truncated=each.truncated)
        for each, score, probability in zip(inputs, values.tolist(), sigmoid(values).tolist(), strict=True)
    ]
    return pb.ScoreResponse(
        scores=scores,
        order=np.argsort(-values, kind="stable").tolist(),
        model=answer.model,
        usage=answer.usage,
        timings=answer.timings,
    )


SCORE = EncodeTask(name="score", check=_check, read=_read, respond=_respond, field="relevance.texts")
