"""Where histograms cut: lengths for the `seq_bucket` label, and times.

Objectives are exact bounds, because a share of requests under an objective can only be read off at a bound.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_SEQ_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)

COARSE_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
CALL_SECONDS = (0.01, 0.1, 1.0, 10.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What is promised, in seconds; each is an exact bound of its histogram, and requests are counted by it.

    Args:
        first_token: from arrival to the first token.
        inter_token: between two tokens of one request, on average over the request.
        duration: from arrival to the end.
    """

    first_token: float = 0.5
    inter_token: float = 0.05
    duration: float = 10.0


def doubling(num_bounds: int, objective: float) -> tuple[float, ...]:
    """Return bounds from 100 microseconds that double, and the objective between them."""
    return tuple(sorted({*(1e-4 * 2.0**i for i in range(num_bounds)), objective}))


class SeqBuckets:
    """Names the range of sequence lengths that a length falls into.

    Args:
        bounds: upper bounds in tokens, inclusive, rising; what is longer falls into "+Inf".
        longest: longest sequence of the model; bounds it cannot exceed are dropped.
    """

    def __init__(self, bounds: Sequence[int], longest: int) -> None:
        self._bounds = tuple(bound for bound in bounds if bound < longest)
        self.labels = (*(str(bound) for bound in self._bounds), "+Inf")

    def index(self, num_tokens: int) -> int:
        """Return which of `labels` a sequence of this length has."""
        return bisect_left(self._bounds, num_tokens)
