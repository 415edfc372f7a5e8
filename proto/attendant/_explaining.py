"""Arguments to an `ExplainRequest`, and its stream of responses to one value: what both clients share."""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import grpc

from attendant._errors import ServerError
from attendant._messages import chat_messages
from attendant._types import AttentionHead, AttentionLayer, Explanation, Turn
from attendant.v1 import explain_pb2 as pb
from attendant.v1 import generation_pb2, image_pb2


class ExplainOptions(TypedDict, total=False):
    """What to explain in place of a text, and how much of it. Meanings and limits: explain.proto."""

    messages: Iterable[Turn] | None
    token_ids: Iterable[int] | None
    image: bytes | None
    """A PNG or JPEG file."""
    target: str | None
    """What is written about a source; the model's own greedy answer if absent."""
    target_ids: Iterable[int] | None
    kinds: Sequence[str]
    layers: Sequence[int]
    heads: Sequence[int]
    entropy_only: bool


def explain_request(model: str, text: str | None, options: ExplainOptions) -> pb.ExplainRequest:
    """Return the request.

    Raises:
        TypeError: an option has no such name, or a value is of the wrong type.
        ValueError: not exactly one input is given, two targets are, or a value does not fit its field.
    """
    known = ExplainOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"unknown option {name!r}; known: {', '.join(known)}")
    messages, image = options.get("messages"), options.get("image")
    token_ids, target_ids = options.get("token_ids"), options.get("target_ids")
    if sum(value is not None for value in (text, messages, token_ids, image)) != 1:
        raise ValueError("give exactly one of text, messages, token_ids and image")
    if options.get("target") is not None and target_ids is not None:
        raise ValueError("give at most one of target and target_ids")
    return pb.ExplainRequest(
        model=model,
        text=text,
        messages=None if messages is None else chat_messages(messages),
        token_ids=_ids(token_ids),
        image=None if image is None else image_pb2.Image(encoded=image),
        target_text=options.get("target"),
        target_ids=_ids(target_ids),
        kinds=options.get("kinds", ()),
        layers=options.get("layers", ()),
        heads=options.get("heads", ()),
        entropy_only=options.get("entropy_only", False),
    )


def _ids(token_ids: Iterable[int] | None) -> generation_pb2.TokenIds | None:
    return None if token_ids is None else generation_pb2.TokenIds(ids=token_ids)


class ExplanationParts:
    """Joins the responses of one call."""

    def __init__(self) -> None:
        self._told: pb.Explanation | None = None
        self._entropies: dict[tuple[int, int], list[float]] = {}
        self._weights: dict[tuple[int, int], list[tuple[float, ...]]] = {}

    def add(self, response: Any) -> None:
        """Take the next response; one that this client is too old to know is passed over."""
        kind = response.WhichOneof("event")
        if kind == "explanation":
            self._told = response.explanation
        if kind == "head" and self._told is not None:
            head = response.head
            place = (head.layer, head.head)
            columns = len(self._told.places[self._told.layers[head.layer].columns].labels)
            self._entropies.setdefault(place, []).extend(head.entropies)
            cells = tuple(head.weights)
            self._weights.setdefault(place, []).extend(
                cells[start : start + columns] for start in range(0, len(cells), columns)
            )

    def whole(self) -> Explanation:
        """Return all of it.

        Raises:
            ServerError: the stream is over and something is missing.
        """
        told = self._told
        if told is None:
            raise ServerError("the explanation broke off without an error", code=grpc.StatusCode.INTERNAL)
        return Explanation(
            model=told.model,
            layers=tuple(self._layer(told, index) for index in range(len(told.layers))),
            target_ids=tuple(told.target_ids),
        )

    def _layer(self, told: pb.Explanation, index: int) -> AttentionLayer:
        layer = told.layers[index]
        rows, columns = (tuple(told.places[place].labels) for place in (layer.rows, layer.columns))
        return AttentionLayer(
            kind=layer.kind,
            layer=layer.layer,
            title=layer.title,
            rows=rows,
            columns=columns,
            left=layer.left if layer.HasField("left") else None,
            right=layer.right if layer.HasField("right") else None,
            heads=tuple(self._head(index, head, len(rows)) for head in layer.heads),
        )

    def _head(self, index: int, head: int, num_rows: int) -> AttentionHead:
        entropies = tuple(self._entropies.get((index, head), ()))
        if len(entropies) != num_rows:
            raise ServerError("the explanation broke off without an error", code=grpc.StatusCode.INTERNAL)
        return AttentionHead(head=head, entropies=entropies, weights=tuple(self._weights[index, head]))
