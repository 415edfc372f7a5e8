"""Attendant's contracts and thin client: all that a caller needs, and all that export and service share.

    from attendant import Client

Importing the package costs nothing; gRPC is loaded with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attendant._encoding import ClassifyOptions, EmbedOptions, FillMaskOptions
    from attendant._encoding_types import (
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
    from attendant._errors import (
        AttendantError,
        Cancelled,
        DeadlineExceeded,
        FieldViolation,
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        ServerError,
        Unavailable,
    )
    from attendant._explaining import ExplainOptions
    from attendant._messages import GenerateOptions
    from attendant._types import (
        AttentionHead,
        AttentionLayer,
        Check,
        Delta,
        Embedding,
        Embeddings,
        Event,
        Explanation,
        Finished,
        Generation,
        Message,
        Model,
        Started,
        Timings,
        TokenLogprob,
        Tokens,
        TopLogprob,
        Usage,
    )
    from attendant.aio import AsyncClient, AsyncGenerateStream
    from attendant.client import Client, GenerateStream

__all__ = [
    "AsyncClient",
    "AsyncGenerateStream",
    "AttendantError",
    "AttentionHead",
    "AttentionLayer",
    "Cancelled",
    "Check",
    "ClassScore",
    "Classification",
    "Classifications",
    "ClassifyOptions",
    "Client",
    "DeadlineExceeded",
    "Delta",
    "EmbedOptions",
    "Embedding",
    "Embeddings",
    "Event",
    "ExplainOptions",
    "Explanation",
    "FieldViolation",
    "FillMaskOptions",
    "FilledMask",
    "FilledText",
    "FilledTexts",
    "Finished",
    "GenerateOptions",
    "GenerateStream",
    "Generation",
    "InvalidRequest",
    "Message",
    "Model",
    "ModelNotFound",
    "Overloaded",
    "Pixels",
    "Ranking",
    "ServerError",
    "Started",
    "TaggedToken",
    "Tagging",
    "Taggings",
    "TextScore",
    "Timings",
    "TokenCandidate",
    "TokenLogprob",
    "Tokens",
    "TopLogprob",
    "Unavailable",
    "Usage",
]

_MODULES = (
    "attendant._types",
    "attendant._errors",
    "attendant._messages",
    "attendant._encoding_types",
    "attendant._encoding",
    "attendant._explaining",
    "attendant.client",
    "attendant.aio",
)


def __getattr__(name: str) -> object:
    """Load the module that defines a public name, the first time it is asked for."""
    if name in __all__:
        for module in map(import_module, _MODULES):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
