"""What a run comes to: throughput, percentiles by prompt length, and how requests ended."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.simulation.fleet import Run
from service.simulation.replica import Ending, Outcome

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Of durations in seconds; None where there was nothing to measure."""

    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthReport:
    """What became of the requests whose prompts are of a range of lengths.

    Args:
        up_to_tokens: longest prompt of the range; None where there is no limit.
        requests: that arrived.
        endings: how many ended in each way.
        on_time: finished before they were of no use any more; over all that arrived this is the goodput.
        ttft: arrival to first token, of all that got one.
        itl: a token to the next one.
        e2e: arrival to the end, of all that finished.
        longest_wait_seconds: until a first token, or an end without one.
    """

    up_to_tokens: int | None
    requests: int
    endings: dict[str, int]
    on_time: int
    ttft: Percentiles
    itl: Percentiles
    e2e: Percentiles
    longest_wait_seconds: float

    @property
    def goodput(self) -> float:
        """The share of all arrivals that was finished in time: refusals are misses."""
        return self.on_time / self.requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a fleet made of a trace.

    Args:
        replicas: of the fleet.
        seconds: from the first arrival until the last request ended.
        requests_per_second: that finished.
        output_tokens_per_second: that were written, those of requests that did not finish included.
        utilisation: share of the time that replicas worked.
        padding: share of rows and prompt tokens that were computed for nobody.
        steps: of all replicas.
        total: over all lengths.
        by_length: the same for each range of lengths that there were requests of.
    """

    replicas: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    utilisation: float
    padding: float
    steps: int
    total: LengthReport
    by_length: tuple[LengthReport, ...]


def report(run: Run, bounds: Sequence[int]) -> Report:
    """Sum a run up.

    Args:
        run: with at least one request.
        bounds: longest prompts, in tokens, of all ranges but the last; rising.
    """
    seconds, replicas = run.seconds, len(run.efforts)
    per_second = 1 / seconds if seconds > 0 else 0.0
    finished = sum(outcome.ending is Ending.FINISHED for outcome in run.outcomes)
    written = sum(outcome.num_tokens for outcome in run.outcomes)
    padding = sum(effort.padding_tokens for effort in run.efforts)
    tokens = padding + sum(effort.real_tokens for effort in run.efforts)
    ranges = zip((0, *bounds), (*bounds, None), strict=True)
    by_length = [
        (high, [o for o in run.outcomes if low < o.arrival.prompt_tokens <= (high or math.inf)]) for low, high in ranges
    ]
    return Report(
        replicas=replicas,
        seconds=seconds,
        requests_per_second=finished * per_second,
        output_tokens_per_second=written * per_second,
        utilisation=sum(effort.busy_seconds for effort in run.efforts) * per_second / replicas,
        padding=padding / tokens if tokens else 0.0,
        steps=sum(effort.steps for effort in run.efforts),
        total=length_report(None, run.outcomes),
        by_length=tuple(length_report(high, outcomes) for high, outcomes in by_length if outcomes),
    )


def length_report(up_to_tokens: int | None, outcomes: Sequence[Outcome]) -> LengthReport:
    """Sum up what became of some requests, at least one, all of which have ended."""
    return LengthReport(
        up_to_tokens=up_to_tokens,
        requests=len(outcomes),
        endings=dict(Counter(outcome.ending.value for outcome in outcomes if outcome.ending is not None)),
        on_time=sum(outcome.is_on_time for outcome in outcomes),
        ttft=percentiles(outcome.ttft for outcome in outcomes),
        itl=percentiles(gap for outcome in outcomes for gap in outcome.gaps),
        e2e=percentiles(outcome.e2e for outcome in outcomes),
        longest_wait_seconds=max(outcome.wait_seconds for outcome in outcomes),
    )


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Return the percentiles of those that are not None."""
    rising = sorted(value for value in values if value is not None)
    found = {name: quantile(rising, share) if rising else None for name, share in QUANTILES.items()}
    return Percentiles(**found)


def quantile(rising: Sequence[float], share: float) -> float:
    """Return the least of these values that a share of them does not exceed (nearest rank)."""
    return rising[max(0, math.ceil(share * len(rising)) - 1)]
