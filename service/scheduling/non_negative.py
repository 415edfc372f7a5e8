"""Least squares with three non-negative coefficients, from sums of products and solved exactly: 2^3 cases at most."""

from collections.abc import Sequence
from itertools import combinations
from math import sqrt

Triple = tuple[float, float, float]

NUM_SUMS = 9
"""Sums that a fit needs: six products of two features, three of a feature with the target."""

# Of features scaled to unit length: it shares alike what the data cannot tell apart, and is not felt where they can.
_RIDGE = 1e-6
_SUBSETS = tuple(subset for size in (3, 2, 1) for subset in combinations(range(3), size))


def products(features: Triple, target: float, weight: float) -> tuple[float, ...]:
    """Return what one observation adds to the sums."""
    a, b, c = features
    wa, wb, wc = weight * a, weight * b, weight * c
    return (wa * a, wa * b, wa * c, wb * b, wb * c, wc * c, wa * target, wb * target, wc * target)


def solve(sums: Sequence[float]) -> Triple:
    """Return the non-negative coefficients of least squared error; 0 for a feature that was never there.

    If the best of all coefficients are non-negative, they are the answer. Otherwise some are zero, and it is the best
    of a subset of the features, the one that explains most among those whose best is non-negative.
    """
    aa, ab, ac, bb, bc, cc, *targets = sums
    scales = [sqrt(square) or 1.0 for square in (aa, bb, cc)]
    matrix = [
        [row[j] / (scales[i] * scales[j]) + _RIDGE * (i == j) for j in range(3)]
        for i, row in enumerate(((aa, ab, ac), (ab, bb, bc), (ac, bc, cc)))
    ]
    target = [targets[i] / scales[i] for i in range(3)]
    best, most = [0.0, 0.0, 0.0], 0.0
    for subset in _SUBSETS:
        found = _solve_on(subset, matrix, target)
        if min(found) < 0.0:
            continue
        explained = sum(x * y for x, y in zip(found, target, strict=True))
        if explained > most:
            best, most = found, explained
        if len(subset) == 3:
            break
    return (best[0] / scales[0], best[1] / scales[1], best[2] / scales[2])


def _solve_on(subset: Sequence[int], matrix: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """Solve the positive definite system of some of the unknowns; the others are 0."""
    rows = [[*(matrix[i][j] for j in subset), target[i]] for i in subset]
    size = len(rows)
    for pivot in range(size):
        for lower in range(pivot + 1, size):
            factor = rows[lower][pivot] / rows[pivot][pivot]
            for column in range(pivot, size + 1):
                rows[lower][column] -= factor * rows[pivot][column]
    found = [0.0, 0.0, 0.0]
    for i in reversed(range(size)):
        later = sum(rows[i][j] * found[subset[j]] for j in range(i + 1, size))
        found[subset[i]] = (rows[i][size] - later) / rows[i][i]
    return found
