"""How long answers turn out to be, learned from those that ended: requests rarely use all that they are allowed."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from math import ceil

ENOUGH = 16
"""Answers before anything is said."""

_KEPT = 256


class OutputLengths:
    """Shares of max_tokens that answers used, newest first to be remembered, for each order of max_tokens.

    A share and not a number of tokens: so callers who ask for exactly what they get are told apart from callers who
    leave the limit wide, as long as their limits are not of one order.
    """

    def __init__(self) -> None:
        self._shares: dict[int, _Newest] = {}

    def observe(self, max_tokens: int, num_tokens: int) -> None:
        """Learn that an answer of at most `max_tokens` had so many."""
        self._shares.setdefault(max_tokens.bit_length(), _Newest()).add(num_tokens / max_tokens)

    def remaining(self, max_tokens: int, num_output: int, quantile: float) -> int | None:
        """Return how many tokens are still to come, which they exceed with a probability of 1 - `quantile`.

        Args:
            max_tokens: of the request.
            num_output: tokens that it has already; longer answers alone are asked.
            quantile: in [0, 1].

        Returns:
            At least 1; None before enough answers of this order of `max_tokens` were seen.
        """
        newest = self._shares.get(max_tokens.bit_length())
        if newest is None or len(newest.sorted) < ENOUGH:
            return None
        longer = newest.sorted[bisect_right(newest.sorted, num_output / max_tokens) :]
        if not longer:  # it is already longer than all that are remembered
            return max_tokens - num_output
        share = longer[min(len(longer) - 1, int(quantile * len(longer)))]
        return max(1, ceil(share * max_tokens) - num_output)


class _Newest:
    """The newest values, in order of age and in order of size."""

    def __init__(self) -> None:
        self.sorted: list[float] = []
        self._by_age: deque[float] = deque()

    def add(self, value: float) -> None:
        insort(self.sorted, value)
        self._by_age.append(value)
        if len(self._by_age) > _KEPT:
            del self.sorted[bisect_left(self.sorted, self._by_age.popleft())]
