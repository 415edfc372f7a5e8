"""A `TagTokensRequest` to texts, and logits of their tokens to its response: every limit of the proto is kept here."""

from collections.abc import Sequence

from attendant.bundle import Manifest
from attendant.v1 import tagging_pb2 as pb
from service.engine.finishing import Ranking, rank
from service.rpc.convert import check_bytes
from service.rpc.encode_task import Answer, EncodeTask, Finish, Reading
from service.rpc.texts import Input, Limits, check_choice, check_number, input_of, read_single


def _check(request: pb.TagTokensRequest, manifest: Manifest, max_bytes: int) -> Finish[Ranking]:
    classes = manifest.classes
    assert classes is not None, "the schema demands it of a tagging bundle"
    check_number("inputs", request.inputs)
    for index, item in enumerate(request.inputs):
        check_choice(f"inputs[{index}]", item, ("text", "token_ids"))
    check_bytes("inputs", max_bytes, *(item.text for item in request.inputs))
    return lambda logits: rank(logits, 1, multi_label=classes.multi_label)


def _read(request: pb.TagTokensRequest, reading: Reading) -> list[Input]:
    limits = Limits(tokens=reading.capacity, truncate=request.truncate)
    return [
        input_of(read_single(f"inputs[{index}]", reading.codec, limits, item))
        for index, item in enumerate(request.inputs)
    ]


def _respond(request: pb.TagTokensRequest, inputs: Sequence[Input], answer: Answer[Ranking]) -> pb.TagTokensResponse:
    taggings = [
        pb.Tagging(tokens=_tokens(each, ranking, answer.reading), num_tokens=each.item.length, truncated=each.truncated)
        for each, ranking in zip(inputs, answer.results, strict=True)
    ]
    return pb.TagTokensResponse(taggings=taggings, model=answer.model, usage=answer.usage, timings=answer.timings)


def _tokens(each: Input, ranking: Ranking, reading: Reading) -> list[pb.TaggedToken]:
    text, classes = each.text, reading.manifest.classes
    assert text is not None and classes is not None, "a text, and a tagging bundle"
    return [
        pb.TaggedToken(
            token_id=token_id,
            token=reading.codec.token_text(token_id),
            label=classes.labels[int(ranking.index[place, 0])],
            probability=float(ranking.probability[place, 0]),
            start=text.offsets[place][0],
            end=text.offsets[place][1],
        )
        for place, token_id in enumerate(text.token_ids)
        if not text.is_special[place]
    ]


TAG = EncodeTask(name="tag", check=_check, read=_read, respond=_respond)
