"""Arguments to request messages and back for tasks of encoders: the part that both clients share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, cast

from attendant._encoding_types import (
    Classifiable,
    Classification,
    Classifications,
    ClassScore,
    FilledMask,
    FilledText,
    FilledTexts,
    Pixels,
    Ranking,
    TaggedToken,
    Tagging,
    Taggings,
    TextScore,
    TokenCandidate,
)
from attendant._messages import set_field, timings_of, usage_of, wire_value
from attendant._types import Embedding, Embeddings, Pooling
from attendant.v1 import classification_pb2, embedding_pb2, fill_mask_pb2, scoring_pb2, tagging_pb2

Texts = str | Iterable[str | Sequence[int]]
"""One text, or several texts or sequences of token ids."""


class EncodeOptions(TypedDict, total=False):
    """What every task of encoders may be told. Meanings and limits: embedding.proto."""

    truncate: bool | None
    priority: int | None
    latency_budget: float | None
    """Seconds within which the whole answer is wanted."""


class EmbedOptions(EncodeOptions, total=False):
    """How to embed; what is absent or None is left to the model. Meanings and limits: embedding.proto."""

    pooling: Pooling | None
    normalize: bool | None
    dimensions: int | None


class ClassifyOptions(EncodeOptions, total=False):
    """How to classify. Meanings and limits: classification.proto."""

    top_k: int | None
    logits: bool | None
    resize: bool | None


class FillMaskOptions(EncodeOptions, total=False):
    """How to fill gaps. Meanings and limits: fill_mask.proto."""

    top_k: int | None


def embed_request(model: str, inputs: Texts, options: EmbedOptions) -> embedding_pb2.EmbedRequest:
    """Return the request; a single text stands for a list of one.

    Raises:
        TypeError: an input is neither text nor token ids, or an option has no such name.
        ValueError: pooling is none of the four, or a value does not fit its field.
    """
    request = embedding_pb2.EmbedRequest(model=model)
    given = dict(options)
    if (pooling := options.get("pooling")) is not None:
        given["pooling"] = f"POOLING_{pooling.upper()}"
    _set_options(request, given, EmbedOptions)
    _add_texts(request, inputs)
    return request


def classify_request(
    model: str, inputs: Classifiable | Iterable[Classifiable], options: ClassifyOptions
) -> classification_pb2.ClassifyRequest:
    """Return the request; a single text, pair of texts or image stands for a list of one.

    Raises:
        TypeError: an input is none of what can be classified, or an option has no such name.
        ValueError: a value does not fit its field.
    """
    request = classification_pb2.ClassifyRequest(model=model)
    _set_options(request, options, ClassifyOptions)
    alone = isinstance(inputs, str | bytes | Pixels) or _is_pair(inputs)
    for index, item in enumerate([inputs] if alone else cast(Iterable[Classifiable], inputs)):
        name, wire = f"inputs[{index}]", request.inputs.add()
        if isinstance(item, bytes):
            set_field(wire.image, "encoded", item, name)
        elif isinstance(item, Pixels):
            set_field(wire.image.tensor, "shape", item.shape, name)
            set_field(wire.image.tensor, "values", item.values, name)
        elif _is_pair(item):
            first, second = cast(tuple[str, str], item)
            set_field(wire.pair, "first", first, name)
            set_field(wire.pair, "second", second, name)
        else:
            _set_text(wire, item, name)
    return request


def tag_request(model: str, inputs: Texts, options: EncodeOptions) -> tagging_pb2.TagTokensRequest:
    """Return the request; errors are those of `embed_request`."""
    request = tagging_pb2.TagTokensRequest(model=model)
    _set_options(request, options, EncodeOptions)
    _add_texts(request, inputs)
    return request


def fill_mask_request(model: str, inputs: Texts, options: FillMaskOptions) -> fill_mask_pb2.FillMaskRequest:
    """Return the request; errors are those of `embed_request`."""
    request = fill_mask_pb2.FillMaskRequest(model=model)
    _set_options(request, options, FillMaskOptions)
    _add_texts(request, inputs)
    return request


def rerank_request(model: str, query: str, texts: Iterable[str], options: EncodeOptions) -> scoring_pb2.ScoreRequest:
    """Return the request.

    Raises:
        TypeError: the query or a text is no text, or an option has no such name.
        ValueError: a value does not fit its field.
    """
    request = scoring_pb2.ScoreRequest(model=model)
    _set_options(request, options, EncodeOptions)
    request.relevance.SetInParent()
    set_field(request.relevance, "query", query)
    set_field(request.relevance, "texts", [texts] if isinstance(texts, str) else texts)
    return request


def embeddings(response: embedding_pb2.EmbedResponse) -> Embeddings:
    """Return the answer to an EmbedRequest."""
    found = tuple(
        Embedding(values=tuple(each.values), tokens=each.tokens, truncated=each.truncated)
        for each in response.embeddings
    )
    return Embeddings(embeddings=found, **_around(response))


def classifications(response: classification_pb2.ClassifyResponse) -> Classifications:
    """Return the answer to a ClassifyRequest."""
    found = tuple(
        Classification(classes=tuple(map(_score, each.classes)), tokens=each.tokens, truncated=each.truncated)
        for each in response.classifications
    )
    return Classifications(classifications=found, **_around(response))


def taggings(response: tagging_pb2.TagTokensResponse) -> Taggings:
    """Return the answer to a TagTokensRequest."""
    found = tuple(
        Tagging(
            tokens=tuple(
                TaggedToken(
                    token_id=token.token_id,
                    token=token.token,
                    label=token.label,
                    probability=token.probability,
                    start=token.start,
                    end=token.end,
                )
                for token in each.tokens
            ),
            num_tokens=each.num_tokens,
            truncated=each.truncated,
        )
        for each in response.taggings
    )
    return Taggings(taggings=found, **_around(response))


def filled_texts(response: fill_mask_pb2.FillMaskResponse) -> FilledTexts:
    """Return the answer to a FillMaskRequest."""
    found = tuple(
        FilledText(masks=tuple(map(_mask, each.masks)), tokens=each.tokens, truncated=each.truncated)
        for each in response.texts
    )
    return FilledTexts(texts=found, **_around(response))


def ranking(response: scoring_pb2.ScoreResponse) -> Ranking:
    """Return the answer to a ScoreRequest."""
    scores = tuple(
        TextScore(score=each.score, probability=each.probability, tokens=each.tokens, truncated=each.truncated)
        for each in response.scores
    )
    return Ranking(scores=scores, order=tuple(response.order), **_around(response))


def _score(score: classification_pb2.ClassScore) -> ClassScore:
    logit = score.logit if score.HasField("logit") else None
    return ClassScore(index=score.index, label=score.label, probability=score.probability, logit=logit)


def _mask(mask: fill_mask_pb2.FilledMask) -> FilledMask:
    candidates = tuple(
        TokenCandidate(token_id=each.token_id, token=each.token, probability=each.probability)
        for each in mask.candidates
    )
    return FilledMask(position=mask.position, candidates=candidates)


def _around(response: Any) -> dict[str, Any]:
    """Return what every response says beside its results."""
    return {"model": response.model, "usage": usage_of(response.usage), "timings": timings_of(response.timings)}


def _is_pair(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item)


def _add_texts(request: Any, inputs: Texts) -> None:
    for index, item in enumerate([inputs] if isinstance(inputs, str) else inputs):
        _set_text(request.inputs.add(), item, f"inputs[{index}]")


def _set_text(wire: Any, item: object, name: str) -> None:
    if isinstance(item, str):
        set_field(wire, "text", item, name)
    else:
        wire.token_ids.SetInParent()
        set_field(wire.token_ids, "ids", item, name)


def _set_options(request: Any, options: Mapping[str, Any], known: Any) -> None:
    for name, value in options.items():
        if name not in known.__annotations__:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(known.__annotations__)}")
        if value is not None:
            set_field(request, name, wire_value(name, value))
