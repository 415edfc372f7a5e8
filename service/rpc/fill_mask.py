"""A `FillMaskRequest` to texts with gaps, and logits of the gaps to its response; keeps every limit of the proto."""

from collections.abc import Sequence

from attendant.bundle import Manifest
from attendant.v1 import fill_mask_pb2 as pb
from service.engine.finishing import Ranking, rank
from service.errors import InvalidField
from service.rpc.convert import check_bytes
from service.rpc.encode_task import Answer, EncodeTask, Finish, Reading
from service.rpc.texts import Input, Limits, check_choice, check_number, input_of, read_single

DEFAULT_TOP_K = 5
MAX_TOP_K = 100
MAX_MASKS = 64


def _check(request: pb.FillMaskRequest, manifest: Manifest, max_bytes: int) -> Finish[Ranking]:
    assert manifest.vocabulary is not None, "the schema demands it of a bundle that fills masks"
    most = min(MAX_TOP_K, manifest.vocabulary.size)
    top_k = request.top_k if request.HasField("top_k") else min(DEFAULT_TOP_K, most)
    if not 1 <= top_k <= most:
        raise InvalidField("top_k", top_k, f"must be in [1, {most}]")
    check_number("inputs", request.inputs)
    for index, item in enumerate(request.inputs):
        check_choice(f"inputs[{index}]", item, ("text", "token_ids"))
    check_bytes("inputs", max_bytes, *(item.text for item in request.inputs))
    return lambda logits: rank(logits, top_k)


def _read(request: pb.FillMaskRequest, reading: Reading) -> list[Input]:
    limits = Limits(tokens=reading.capacity, truncate=request.truncate)
    return [_read_one(f"inputs[{index}]", item, reading, limits) for index, item in enumerate(request.inputs)]


def _read_one(field: str, item: pb.FillMaskInput, reading: Reading, limits: Limits) -> Input:
    text = read_single(field, reading.codec, limits, item)
    vocabulary = reading.manifest.vocabulary
    assert vocabulary is not None and vocabulary.mask_token_id is not None, "the schema demands it"
    mask = vocabulary.mask_token_id
    places = [place for place, token_id in enumerate(text.token_ids) if token_id == mask]
    if not 1 <= len(places) <= MAX_MASKS:
        spelt = reading.codec.token_text(mask)
        left = " that are left of it" if text.truncated else ""
        raise InvalidField(
            f"{field}.{item.WhichOneof('input')}",
            item.text or list(item.token_ids.ids),
            f"has {len(places)} mask tokens among the {len(text.token_ids)} tokens{left}; "
            f"write {spelt} (id {mask}) where something is to be filled in, 1 to {MAX_MASKS} times",
        )
    return input_of(text, places)


def _respond(request: pb.FillMaskRequest, inputs: Sequence[Input], answer: Answer[Ranking]) -> pb.FillMaskResponse:
    texts = [
        pb.FilledText(
            masks=[
                pb.FilledMask(position=position, candidates=_candidates(ranking, row, answer.reading))
                for row, position in enumerate(each.item.places)
            ],
            tokens=each.item.length,
            truncated=each.truncated,
        )
        for each, ranking in zip(inputs, answer.results, strict=True)
    ]
    return pb.FillMaskResponse(texts=texts, model=answer.model, usage=answer.usage, timings=answer.timings)


def _candidates(ranking: Ranking, row: int, reading: Reading) -> list[pb.TokenCandidate]:
    return [
        pb.TokenCandidate(token_id=token_id, token=reading.codec.token_text(token_id), probability=probability)
        for token_id, probability in zip(ranking.index[row].tolist(), ranking.probability[row].tolist(), strict=True)
    ]


FILL_MASK = EncodeTask(name="fill_mask", check=_check, read=_read, respond=_respond)
