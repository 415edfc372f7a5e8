"""What it takes for two runs of the same rows to agree: every bit on the CPU, a stated tolerance on a device.

The CPU's kernels sum in an order that depends on nothing but the row itself. A device's kernels are chosen by the shape
of the whole batch, each rounds its sums to the half type in its own way, and every later layer carries that on. So two
sound runs differ by as much as each differs from exact arithmetic, and are held to what the golden run is held to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check, Manifest

_Array = NDArray[np.generic]


def relative_error(measured: _Array, expected: _Array) -> float:
    """Return max |a - b| / max |a|, or infinity if anything is not finite or all of `expected` is 0."""
    wide = expected.astype(np.float64)
    difference, largest = float(np.abs(measured.astype(np.float64) - wide).max()), float(np.abs(wide).max())
    return difference / largest if np.isfinite(difference) and largest > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two runs may be apart; `bound` is a share of the largest number of the second, 0 means the same bits."""

    bound: float

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Return what holds for a bundle where it is served."""
        return cls(0.0 if manifest.target == "cpu" else manifest.golden.bound)

    def apart(self, pairs: Iterable[tuple[_Array, _Array]]) -> float:
        """Return how far pairs are apart: how many numbers differ at all, or the largest error of a pair."""
        if self.bound == 0:
            return float(sum(int((one != other).sum()) for one, other in pairs))
        return max((relative_error(one, other) for one, other in pairs), default=0.0)

    def check(self, runs: str, pairs: Iterable[tuple[_Array, _Array]], grid: str) -> Check:
        """Compare pairs of arrays.

        Args:
            runs: what is compared, "one pass and chunks" for instance.
            pairs: of arrays of the same shape.
            grid: over which lengths and rows.
        """
        subject = "bits that differ" if self.bound == 0 else "difference"
        return Check(name=f"{subject} between {runs}", measured=self.apart(pairs), bound=self.bound, grid=grid)
