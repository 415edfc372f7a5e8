"""How long answers turn out to be, learned from those that ended: requests rarely use all that they are allowed."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from math import ceil

ENOUGH = 16
"""Answers before anything is said."""

_KEPT = 256


class OutputLengths:
    """Shares of max_tokens that the newest answers used, for each order of max_tokens and over all.

    A share and not a number of tokens: so callers who ask for exactly what they get are told apart from callers who
    leave the limit wide, as long as their limits are not of one order.
    """

    def __init__(self) -> None:
        self._all = _Newest()
        self._by_order: dict[int, _Newest] = {}

    def observe(self, max_tokens: int, num_tokens: int) -> None:
        """Learn that an answer of at most `max_tokens` had so many."""
        for newest in (self._all, self._by_order.setdefault(max_tokens.bit_length(), _Newest())):
            newest.add(num_tokens / max_tokens)

    @property
    def is_known(self) -> bool:
        """Whether enough answers were seen; before, all are taken to be as long as they may be."""
        return len(self._all.sorted) >= ENOUGH

    def remaining(self, max_tokens: int, num_output: int, quantile: float) -> int:
        """Return how many tokens are still to come, at least 1; there are more with a probability of 1 - `quantile`.

        Args:
            max_tokens: of the request.
            num_output: tokens that it has already; longer answers alone are asked.
            quantile: in [0, 1].
        """
        own = self._by_order.get(max_tokens.bit_length(), self._all)
        known = (own if len(own.sorted) >= ENOUGH else self._all).sorted
        longer = known[bisect_right(known, num_output / max_tokens) :] if self.is_known else []
        if not longer:
            return max(1, max_tokens - num_output)
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
