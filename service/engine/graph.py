"""What runs a bundle's step graph, as its callers see it.

The engine does not look at logits; it hands them to whatever chooses tokens. So a graph that keeps them on a device and
one that has them in the host's memory are the same to it: only their type differs.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

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

    def feed(self, slot: int, token_ids: Sequence[int], *, every_position: bool = False) -> Logits:
        """Feed a whole prompt to a slot that has just begun, cut only where the bundle has it cut."""

    def chunk(self, slot: int, token_ids: Sequence[int], start: int, *, every_position: bool = False) -> Logits:
        """Feed positions [start, start + T) to one slot, and return logits [1, V], or [T, V]."""
