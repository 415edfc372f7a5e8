"""What a task of an encoder consists of: checking a request, reading its inputs, and answering with the results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from attendant.bundle import Manifest
from attendant.v1 import generation_pb2
from service.encode_loop import Finish
from service.errors import Unsupported
from service.metrics import Task
from service.rpc.texts import Input
from service.text import TextCodec

__all__ = ["Answer", "EncodeTask", "Finish", "Reading"]

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What it takes to read inputs: the bundle, its tokenizer if it has one, and the most tokens of an input."""

    manifest: Manifest
    text: TextCodec | None
    capacity: int

    @property
    def codec(self) -> TextCodec:
        """What tokenises.

        Raises:
            Unsupported: the model takes no text.
        """
        if self.text is None:
            raise Unsupported(f"model {self.manifest.key} takes no text")
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[Result]):
    """What a call came to: a result for each input, and what every response says beside it."""

    results: Sequence[Result]
    reading: Reading
    usage: generation_pb2.Usage
    timings: generation_pb2.Timings

    @property
    def model(self) -> str:
        """The model's full name."""
        return self.reading.manifest.key


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One RPC of encoders; the message types and the type of results are its own.

    Args:
        name: the task as manifests and metrics name it.
        check: looks at the message alone, given the most bytes of text; raises what is wrong with it, and returns what
            is to be done with what the graph makes of each input. Cheap.
        read: makes the inputs, in a thread.
        respond: makes the response.
        field: what the inputs are called in errors.
    """

    name: Task
    check: Callable[[Any, Manifest, int], Finish[Any]]
    read: Callable[[Any, Reading], list[Input]]
    respond: Callable[[Any, Sequence[Input], Answer[Any]], Message]
    field: str = "inputs"
