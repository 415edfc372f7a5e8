"""Which texts an encoder reads together: of similar length, because every row is padded to the longest.

Nothing is known here but lengths and, once it was learned, what they cost. `split` divides all that waits so that it
takes least time; `form_batch` needs no costs, and serves until there are some.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How large a batch may be.

    Args:
        max_rows: texts.
        max_tokens: tokens, padding included; a longer text runs alone.
        max_padding: share of the tokens that may be padding.

    Raises:
        ValueError: a limit is out of range.
    """

    max_rows: int = 64
    max_tokens: int = 1024
    max_padding: float = 0.1

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.max_padding < 1.0:
            raise ValueError(f"max_padding is {self.max_padding}; it must lie in [0, 1)")

    def rows(self, longest: int) -> int:
        """Return how many texts a batch may have whose longest has so many tokens."""
        return max(1, min(self.max_rows, self.max_tokens // longest))


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Seconds of a batch, as a latency model has learned them: of a run, of a token and of an attended position."""

    run: float
    token: float
    attended: float

    def of_row(self, longest: int) -> float:
        """Return the seconds that each text adds to a batch whose longest has so many tokens."""
        return longest * (self.token + longest * self.attended)

    def of_batch(self, rows: int, longest: int) -> float:
        """Return the seconds of a batch of so many texts."""
        return self.run + rows * self.of_row(longest)


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbours by length: the half-open range of their ranks, the shortest text first; and their predicted time."""

    first: int
    last: int
    seconds: float


def split(lengths: Sequence[int], cost: BatchCost, limits: BatchLimits) -> list[Batch]:
    """Divide texts into the batches that take least time one after the other.

    Dynamic programming over the sorted lengths. Of texts of equal length a batch takes all, unless it is full: moving
    one of them into the batch before never costs more. So only where a run of equal lengths ends has a batch's
    beginning to be searched for. That takes as many steps as there are texts and, at each length that occurs, as many
    as a batch has rows: for the default limits less than 5,000 in all, however many texts there are.

    Args:
        lengths: tokens of each text, ascending.
        cost: of a batch.
        limits: of a batch.
    """
    tokens = [0, *accumulate(lengths)]
    best, begins = [0.0], [0]
    for last, longest in enumerate(lengths, 1):
        rows = limits.rows(longest)
        lowest = last - rows
        if last == len(lengths) or lengths[last] != longest:
            candidates = range(last - 1, max(lowest, 0) - 1, -1)
        else:
            candidates = range(max(lowest, 0), lowest + 1)
        row = cost.of_row(longest)
        least, begin = inf, last - 1
        for first in candidates:
            padded = (last - first) * longest
            if padded - tokens[last] + tokens[first] > limits.max_padding * padded:
                break
            seconds = best[first] + (last - first) * row
            if seconds < least:
                least, begin = seconds, first
        best.append(least + cost.run)
        begins.append(begin)
    batches: list[Batch] = []
    last = len(lengths)
    while last:
        first = begins[last]
        batches.append(Batch(first, last, cost.of_batch(last - first, lengths[last - 1])))
        last = first
    return batches[::-1]


def form_batch(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return the indices of the texts to run now, shortest first: as many real tokens as the limits allow.

    Of all ranges of neighbours by length that hold the first text and keep the limits, the one with the most tokens is
    taken, and of equals the one with the least padding.

    Args:
        lengths: tokens of each waiting text, the most urgent first; at least one.
        limits: of the batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    rank = order.index(0)
    tokens = [0, *accumulate(lengths[index] for index in order)]
    best, best_key = [0], (0, 0)
    for last in range(rank, min(len(order), rank + limits.max_rows)):
        longest = lengths[order[last]]
        for first in range(max(0, last + 1 - limits.max_rows), rank + 1):
            rows, real = last + 1 - first, tokens[last + 1] - tokens[first]
            key = (real, -rows * longest)
            if key > best_key and _fits(rows, longest, real, limits):
                best, best_key = order[first : last + 1], key
    return best


def _fits(rows: int, longest: int, tokens: int, limits: BatchLimits) -> bool:
    padded = rows * longest
    return rows <= limits.rows(longest) and padded - tokens <= limits.max_padding * padded
