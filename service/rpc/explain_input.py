"""What an `ExplainRequest` is about: read, tokenised, and laid out, every row and column with its name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Manifest, Places, Role
from attendant.v1 import explain_pb2 as pb
from service.engine.explain_graph import ExplainGraph
from service.errors import InvalidField, TextTooLong, Unsupported
from service.rpc.catalog import ServedModel
from service.rpc.convert import check_bytes, read_conversation
from service.rpc.explain import patch_labels
from service.rpc.pixels import read_image
from service.scheduling.request import Source
from service.text import TextCodec

_KNOWN = (
    frozenset({Role.TOKEN_IDS}),
    frozenset({Role.IMAGE}),
    frozenset({Role.SOURCE_IDS, Role.TOKEN_IDS}),
    frozenset({Role.IMAGE, Role.TOKEN_IDS}),
)

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What is read: tokens or the values of an image [channels, height, width]."""

    token_ids: TokenIds = ()
    image: NDArray[np.float32] | None = None

    @property
    def source(self) -> Source:
        """The same for an engine that writes about it."""
        return Source(self.token_ids) if self.image is None else Source(pixels=self.image.tobytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """All that the graph is given, and the names of places; `target_ids` were written about a source."""

    inputs: dict[Role, NDArray[np.generic]]
    labels: dict[Places, list[str]]
    target_ids: TokenIds = ()

    @property
    def sizes(self) -> dict[Places, int]:
        """How many places there are of each kind."""
        return {place: len(labels) for place, labels in self.labels.items()}


def writes(graph: ExplainGraph) -> bool:
    """Say whether a model writes about a source."""
    return len(graph.roles) > 1


def check(request: pb.ExplainRequest, graph: ExplainGraph, manifest: Manifest, max_bytes: int) -> None:
    """Check what is cheap to check, before anything works on it.

    Raises:
        InvalidField: an input is missing, empty, too large, or not what the model reads.
        Unsupported: the graph takes what this build does not know.
    """
    roles = graph.roles
    if roles not in _KNOWN:
        raise Unsupported(f"the explain graph of model {manifest.key} takes {', '.join(sorted(roles))}")
    kinds = ("image",) if Role.IMAGE in roles else ("text", "token_ids", "messages")[: 2 if writes(graph) else 3]
    kind, target = request.WhichOneof("input"), request.WhichOneof("target")
    if kind not in kinds:
        raise InvalidField("input", kind, f"model {manifest.key} needs one of {', '.join(kinds)}")
    if target is not None and not writes(graph):
        raise InvalidField(target, "set", f"must be absent: model {manifest.key} writes about no source")
    if kind == "text" and not request.text:
        raise InvalidField("text", "", "must not be empty")
    check_bytes("input", max_bytes, request.text, request.target_text)


def read(request: pb.ExplainRequest, model: ServedModel, graph: ExplainGraph, max_bytes: int) -> Read:
    """Read the input; runs in a thread.

    Raises:
        InvalidField: it cannot be read, or a token id is not of the vocabulary.
        TextTooLong: it has more tokens than the model reads.
    """
    manifest = model.found.manifest
    kind = request.WhichOneof("input")
    if kind == "image":
        assert manifest.image is not None, "the schema demands it of a graph that takes images"
        return Read(image=read_image("image", request.image, manifest.image))
    limits = manifest.limits
    codec = model.source_codec if writes(graph) else model.codec
    limit, name = (
        (limits.max_source_len, "max_source_len") if writes(graph) else (limits.max_model_len, "max_model_len")
    )
    if kind == "messages":
        capacity = limits.max_model_len
        messages = read_conversation(request.messages, max_bytes=max_bytes, capacity=capacity).messages
        token_ids = codec.encode_messages(messages)[1]
    elif kind == "text":
        token_ids = codec.encode_prompt(request.text)
    else:
        token_ids = tuple(request.token_ids.ids)
        codec.check_ids(token_ids, "token_ids.ids")
    _check_length(str(kind), token_ids, limit, name)
    return Read(token_ids=token_ids)


def read_target(request: pb.ExplainRequest, model: ServedModel) -> TokenIds | None:
    """Return what is written, if the request says so; runs in a thread, errors are those of `read`."""
    manifest = model.found.manifest
    kind = request.WhichOneof("target")
    if kind is None:
        return None
    if kind == "target_text":
        vocabulary = manifest.vocabulary
        assert vocabulary is not None, "the schema demands it of a bundle that writes"
        token_ids = model.codec.encode_prompt(request.target_text, add_special_tokens=False)
        token_ids = (*token_ids, *vocabulary.eos_token_ids[:1])
    else:
        token_ids = tuple(request.target_ids.ids)
        model.codec.check_ids(token_ids, "target_ids.ids")
    _check_length(kind, token_ids, manifest.limits.max_model_len, "max_model_len")
    return token_ids


def lay_out(model: ServedModel, graph: ExplainGraph, given: Read, target_ids: TokenIds) -> Subject:
    """Return the subject of an explanation; `target_ids` are empty unless the model writes about a source."""
    inputs: dict[Role, NDArray[np.generic]] = {}
    labels = {Places.GLANCE: ["glance"]}
    if given.image is not None:
        inputs[Role.IMAGE] = given.image
        labels[Places.PATCHES] = patch_labels(graph.told)
    elif writes(graph):
        inputs[Role.SOURCE_IDS] = np.array(given.token_ids, np.int64)
        labels[Places.SOURCE] = _texts(model.source_codec, given.token_ids)
    else:
        inputs[Role.TOKEN_IDS] = np.array(given.token_ids, np.int64)
        labels[Places.TOKENS] = _texts(model.codec, given.token_ids)
    if writes(graph):
        token_ids = (start_token(model.found.manifest), *target_ids[:-1])  # each is read to write the next
        inputs[Role.TOKEN_IDS] = np.array(token_ids, np.int64)
        labels[Places.TOKENS] = _texts(model.codec, token_ids)
        labels[Places.WRITTEN] = _texts(model.codec, target_ids)
    return Subject(inputs=inputs, labels=labels, target_ids=target_ids)


def start_token(manifest: Manifest) -> int:
    """Return the token that begins an answer about a source."""
    vocabulary = manifest.vocabulary
    assert vocabulary is not None and vocabulary.bos_token_id is not None, "the schema demands both where a source is"
    return vocabulary.bos_token_id


def _texts(codec: TextCodec, token_ids: Sequence[int]) -> list[str]:
    return [codec.token_label(token_id) for token_id in token_ids]


def _check_length(field: str, token_ids: Sequence[int], limit: int | None, name: str) -> None:
    if not token_ids:
        raise InvalidField(field, "", "it has no tokens")
    if limit is not None and len(token_ids) > limit:
        raise TextTooLong(field=field, tokens=len(token_ids), limit=limit, limit_name=name, advice="shorten it")
