"""Where histograms cut: lengths for the `seq_bucket` label, and times.

Objectives are exact bounds, because a share of requests under an objective can only be read off at a bound.
"""

from bisect import bisect_left
from collections.abc import Sequence

FIRST_TOKEN_OBJECTIVE_SECONDS = 0.5
INTER_TOKEN_OBJECTIVE_SECONDS = 0.05
DURATION_OBJECTIVE_SECONDS = 10.0

DEFAULT_SEQ_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


def _doubling(num_bounds: int, objective: float) -> tuple[float, ...]:
    """Return bounds from 100 microseconds that double, and the objective between them."""
    return tuple(sorted({*(1e-4 * 2.0**i for i in range(num_bounds)), objective}))


FIRST_TOKEN_SECONDS = _doubling(21, FIRST_TOKEN_OBJECTIVE_SECONDS)  # to 105 s
INTER_TOKEN_SECONDS = _doubling(15, INTER_TOKEN_OBJECTIVE_SECONDS)  # to 1.6 s
DURATION_SECONDS = _doubling(21, DURATION_OBJECTIVE_SECONDS)
COARSE_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def powers_of_two(maximum: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... up to the first power that reaches `maximum`, 14 at most."""
    return tuple(2**i for i in range(min(14, (maximum - 1).bit_length() + 1)))


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
