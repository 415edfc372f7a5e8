"""Service level objectives, and how many replicas they need."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from service.simulation.fleet import Run
from service.simulation.report import QUANTILES, quantile

Measured = Literal["ttft", "itl", "e2e"]

_TARGET = re.compile(r"\s*(?:(ttft|itl|e2e)_(p50|p95|p99)\s*<|(goodput)\s*>)\s*([0-9.]+(?:e-?[0-9]+)?)\s*")


@dataclass(frozen=True, slots=True)
class Target:
    """One objective, such as "ttft_p95<0.5" or "goodput>0.99"; `share` is None for goodput."""

    text: str
    measured: str
    share: float | None
    limit: float

    def value(self, run: Run) -> float:
        """Return what a run comes to. What never got a first token, or never finished, took for ever."""
        outcomes = run.outcomes
        if self.share is None:
            return sum(outcome.is_on_time for outcome in outcomes) / len(outcomes)
        if self.measured == "itl":
            times = [gap for outcome in outcomes for gap in outcome.gaps]
        else:
            found = [outcome.ttft if self.measured == "ttft" else outcome.e2e for outcome in outcomes]
            times = [math.inf if seconds is None else seconds for seconds in found]
        return quantile(sorted(times), self.share) if times else 0.0

    def is_met(self, run: Run) -> bool:
        """Whether a run meets it."""
        value = self.value(run)
        return value > self.limit if self.share is None else value < self.limit


def parse_slo(text: str) -> tuple[Target, ...]:
    """Read objectives, by commas.

    Raises:
        ValueError: one is none.
    """
    targets = []
    for part in text.split(","):
        match = _TARGET.fullmatch(part)
        if match is None:
            raise ValueError(
                f"{part.strip()!r} is no objective; write ttft, itl or e2e, then _p50, _p95 or _p99, then < and "
                "seconds, or goodput> and a share; several by commas"
            )
        measured, percentile, goodput, limit = match.groups()
        share = None if goodput else QUANTILES[percentile]
        targets.append(Target(part.strip(), goodput or measured, share, float(limit)))
    return tuple(targets)


def replicas_needed(
    try_replicas: Callable[[int], Run], targets: tuple[Target, ...], max_replicas: int
) -> tuple[int | None, dict[int, Run]]:
    """Return the least number of replicas that meets all targets, and every run on the way to it.

    It is searched for by doubling and then halving, as if more replicas were never worse.

    Args:
        try_replicas: runs the traffic on so many.
        targets: to meet.
        max_replicas: None is returned if these are too few.
    """
    runs: dict[int, Run] = {}

    def suffices(number: int) -> bool:
        runs[number] = try_replicas(number)
        return all(target.is_met(runs[number]) for target in targets)

    too_few, enough = 0, 1
    while not suffices(enough):
        if enough == max_replicas:
            return None, runs
        too_few, enough = enough, min(2 * enough, max_replicas)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if suffices(middle):
            enough = middle
        else:
            too_few = middle
    return enough, runs
