from attendant.v1 import generation_pb2 as _generation_pb2
from attendant.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExplainRequest(_message.Message):
    __slots__ = ("model", "text", "messages", "token_ids", "image", "target_text", "target_ids", "kinds", "layers", "heads", "entropy_only")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_TEXT_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_ONLY_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    messages: _generation_pb2.ChatMessages
    token_ids: _generation_pb2.TokenIds
    image: _image_pb2.Image
    target_text: str
    target_ids: _generation_pb2.TokenIds
    kinds: _containers.RepeatedScalarFieldContainer[str]
    layers: _containers.RepeatedScalarFieldContainer[int]
    heads: _containers.RepeatedScalarFieldContainer[int]
    entropy_only: bool
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., messages: _Optional[_Union[_generation_pb2.ChatMessages, _Mapping]] = ..., token_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., image: _Optional[_Union[_image_pb2.Image, _Mapping]] = ..., target_text: _Optional[str] = ..., target_ids: _Optional[_Union[_generation_pb2.TokenIds, _Mapping]] = ..., kinds: _Optional[_Iterable[str]] = ..., layers: _Optional[_Iterable[int]] = ..., heads: _Optional[_Iterable[int]] = ..., entropy_only: _Optional[bool] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanation", "head")
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    explanation: Explanation
    head: HeadWeights
    def __init__(self, explanation: _Optional[_Union[Explanation, _Mapping]] = ..., head: _Optional[_Union[HeadWeights, _Mapping]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("model", "layers", "places", "target_ids")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    TARGET_IDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    layers: _containers.RepeatedCompositeFieldContainer[AttentionLayer]
    places: _containers.RepeatedCompositeFieldContainer[AttentionPlaces]
    target_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., layers: _Optional[_Iterable[_Union[AttentionLayer, _Mapping]]] = ..., places: _Optional[_Iterable[_Union[AttentionPlaces, _Mapping]]] = ..., target_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AttentionPlaces(_message.Message):
    __slots__ = ("kind", "labels")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class AttentionLayer(_message.Message):
    __slots__ = ("kind", "layer", "title", "heads", "rows", "columns", "left", "right")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    layer: int
    title: str
    heads: _containers.RepeatedScalarFieldContainer[int]
    rows: int
    columns: int
    left: int
    right: int
    def __init__(self, kind: _Optional[str] = ..., layer: _Optional[int] = ..., title: _Optional[str] = ..., heads: _Optional[_Iterable[int]] = ..., rows: _Optional[int] = ..., columns: _Optional[int] = ..., left: _Optional[int] = ..., right: _Optional[int] = ...) -> None: ...

class HeadWeights(_message.Message):
    __slots__ = ("layer", "head", "first_row", "entropies", "weights")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ENTROPIES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    head: int
    first_row: int
    entropies: _containers.RepeatedScalarFieldContainer[float]
    weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, layer: _Optional[int] = ..., head: _Optional[int] = ..., first_row: _Optional[int] = ..., entropies: _Optional[_Iterable[float]] = ..., weights: _Optional[_Iterable[float]] = ...) -> None: ...
