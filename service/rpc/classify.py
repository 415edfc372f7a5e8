"""A `ClassifyRequest` to texts or images, and logits to its response: every limit of the proto is kept here."""

from collections.abc import Sequence

from attendant.bundle import Manifest
from attendant.v1 import classification_pb2 as pb
from service.engine.encode_graph import Item
from service.engine.finishing import Ranking, rank
from service.errors import InvalidField
from service.rpc.convert import check_bytes
from service.rpc.encode_task import Answer, EncodeTask, Finish, Reading
from service.rpc.pixels import read_image
from service.rpc.texts import (
    Input,
    Limits,
    check_choice,
    check_number,
    check_text,
    input_of,
    read_single,
    read_text,
)


def _check(request: pb.ClassifyRequest, manifest: Manifest, max_bytes: int) -> Finish[Ranking]:
    classes = manifest.classes
    assert classes is not None, "the schema demands it of a classifying bundle"
    top_k = request.top_k if request.HasField("top_k") else len(classes.labels)
    if not 1 <= top_k <= len(classes.labels):
        raise InvalidField("top_k", top_k, f"must be in [1, {len(classes.labels)}], the number of classes")
    check_number("inputs", request.inputs)
    kinds = ("image",) if manifest.image is not None else ("text", "pair", "token_ids")
    for index, item in enumerate(request.inputs):
        if check_choice(f"inputs[{index}]", item, kinds) == "pair":
            check_text(f"inputs[{index}].pair.first", item.pair.first)
            check_text(f"inputs[{index}].pair.second", item.pair.second)
    texts = (text for item in request.inputs for text in (item.text, item.pair.first, item.pair.second))
    check_bytes("inputs", max_bytes, *texts)
    return lambda logits: rank(logits, top_k, multi_label=classes.multi_label)


def _read(request: pb.ClassifyRequest, reading: Reading) -> list[Input]:
    limits = Limits(tokens=reading.capacity, truncate=request.truncate)
    return [
        _read_one(f"inputs[{index}]", item, request.resize, reading, limits)
        for index, item in enumerate(request.inputs)
    ]


def _read_one(field: str, item: pb.ClassifyInput, resize: bool, reading: Reading, limits: Limits) -> Input:
    image = reading.manifest.image
    if image is not None:
        pixels = read_image(f"{field}.image", item.image, image, resize=resize)
        return Input(item=Item(length=reading.capacity, image=pixels))
    if item.WhichOneof("input") == "pair":
        return input_of(read_text(field, reading.codec, limits, item.pair.first, item.pair.second))
    return input_of(read_single(field, reading.codec, limits, item))


def _respond(request: pb.ClassifyRequest, inputs: Sequence[Input], answer: Answer[Ranking]) -> pb.ClassifyResponse:
    classes = answer.reading.manifest.classes
    assert classes is not None, "the schema demands it of a classifying bundle"
    classifications = [
        pb.Classification(
            classes=[
                pb.ClassScore(
                    index=index, label=classes.labels[index], probability=probability,
                    logit=logit if request.logits else None,
                )
                for index, probability, logit in zip(
                    ranking.index.tolist(), ranking.probability.tolist(), ranking.logit.tolist(), strict=True
                )
            ],
            tokens=each.item.length,
            truncated=each.truncated,
        )
        for each, ranking in zip(inputs, answer.results, strict=True)
    ]  # fmt: skip
    return pb.ClassifyResponse(
        classifications=classifications, model=answer.model, usage=answer.usage, timings=answer.timings
    )


CLASSIFY = EncodeTask(name="classify", check=_check, read=_read, respond=_respond)
