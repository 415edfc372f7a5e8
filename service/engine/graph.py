"""What runs a bundle's step graph, as its callers see it.

The engine does not look at logits; it hands them to whatever chooses tokens. So a graph that keeps them on a device and
one that has them in the host's memory are the same to it: only their type differs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.engine.source_graph import Made, SourceGraph
from service.scheduling.work import Phase, Work

Logits = NDArray[np.float32]
Rows_co = TypeVar("Rows_co", covariant=True)


class Graph(Protocol[Rows_co]):
    """Runs decode rows, prompts and chunks of one bundle on its states. Not thread-safe.

    `Rows_co` is what it says of logits [rows, vocabulary].
    """

    @property
    def num_slots(self) -> int:
        """Rows of the states."""

    @property
    def capacity(self) -> int:
        """Positions of one slot."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""

    @property
    def sources(self) -> SourceGraph | None:
        """What reads a source before a sequence about it begins."""

    def begin(self, slot: int, made: Made | None = None) -> None:
        """Begin a sequence in a slot, with what was made of its source if it has one."""

    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        real: Sequence[int] | None = None,
        first_slot: int = 0,
    ) -> Rows_co:
        """Feed one token to each of some slots in a row."""

    def prompts(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> Rows_co:
        """Feed whole prompts to as many slots in a row, in one run."""

    def chunk(self, slot: int, token_ids: Sequence[int], start: int) -> Rows_co:
        """Feed positions [start, start + T) to one slot."""

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy the states of a sequence of `length` positions from slot to slot."""

    def release(self, slot: int) -> None:
        """Give the memory of a slot back."""


class HostGraph(Graph[Logits], Protocol):
    """A graph whose logits are arrays of the host: what can be put to the test at load.

    `observer`, if any, is told of every run: its phase, its work, its seconds.
    """

    observer: Callable[[Phase, Work, float], object] | None

    @property
    def prefill_chunk(self) -> int | None:
        """Where every prompt is cut, or None where cuts do not matter."""

    @property
    def rewinds(self) -> bool:
        """Whether a row can go back to any earlier position."""

    @property
    def joins_prompts(self) -> bool:
        """Whether prompts may be read together."""

    def chunk(self, slot: int, token_ids: Sequence[int], start: int, *, every_position: bool = False) -> Logits:
        """Feed positions [start, start + T) to one slot, and return logits [1, V], or [T, V]."""


def feed(graph: HostGraph, slot: int, token_ids: Sequence[int], *, every_position: bool = False) -> Logits:
    """Feed a whole prompt to a slot that has just begun, cut only where the bundle has it cut.

    Returns:
        Logits [1, V] of its end, or [T, V] of every position.
    """
    size = graph.prefill_chunk or len(token_ids)
    pieces = [
        graph.chunk(slot, token_ids[start : start + size], start, every_position=every_position)
        for start in range(0, len(token_ids), size)
    ]
    return np.concatenate(pieces) if every_position else pieces[-1]


class Padded(NamedTuple):
    """Prompts for one run: token ids [B, longest], lengths [B], and where each ends in the flat token ids [B]."""

    token_ids: NDArray[np.int64]
    lengths: NDArray[np.int32]
    ends: NDArray[np.int64]


def padded(prompts: Sequence[Sequence[int]]) -> Padded:
    """Return prompts padded with token 0 to the longest."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    num_rows, longest = len(prompts), int(lengths.max())
    token_ids = np.zeros((num_rows, longest), np.int64)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = prompt
    return Padded(token_ids, lengths, np.arange(num_rows, dtype=np.int64) * longest + lengths - 1)
