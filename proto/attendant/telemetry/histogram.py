"""A histogram as Prometheus keeps it: cumulative counts under upper bounds."""

from collections import defaultdict
from dataclasses import dataclass, field
from math import inf


@dataclass(slots=True)
class Histogram:
    """Cumulative counts by upper bound, in the unit of what is measured; the last bound is infinite."""

    counts: dict[float, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def count(self) -> int:
        """How many were observed."""
        return int(self.counts.get(inf, 0))

    @property
    def longest(self) -> float:
        """The last finite bound, beyond which nothing is told apart."""
        return max((bound for bound in self.counts if bound < inf), default=0.0)

    def quantile(self, q: float) -> float:
        """Return the q-quantile as PromQL's histogram_quantile does: linear inside its bucket.

        Beyond the last finite bound nothing is known, and the answer is infinite.
        """
        rank, low, below = q * self.count, 0.0, 0.0
        for bound, count in sorted(self.counts.items()):
            if count >= rank:
                return inf if bound == inf else low + (bound - low) * (rank - below) / (count - below or 1)
            low, below = bound, count
        return inf
