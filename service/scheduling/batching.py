"""Which texts an encoder reads together: of similar length, because every row is padded to the longest.

Nothing is known here but lengths. The oldest text is always among the chosen, so none waits for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


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


def form_batch(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return the indices of the texts to run now, shortest first: as many real tokens as the limits allow.

    Of all ranges of neighbours by length that hold the oldest text and keep the limits, the one with the most tokens is
    taken, and of equals the one with the least padding.

    Args:
        lengths: tokens of each waiting text, the oldest first; at least one.
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
    return rows <= limits.max_rows and padded <= limits.max_tokens and padded - tokens <= limits.max_padding * padded
