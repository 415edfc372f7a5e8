"""Arrivals drawn from a process: Poisson with bursts, lengths with a heavy tail."""

import math
import random
from dataclasses import dataclass

from service.simulation.trace import Arrival

TAIL = 1.5
"""Exponent of the Pareto law of long prompts: their mean is finite, their variance is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A process that requests come from.

    Time alternates between bursts of `burst_factor` times the mean rate, for `burst_share` of it, and calm, whose rate
    makes up for it. Prompts and answers are log-normal about their medians; a share of the prompts is Pareto instead.

    Args:
        rate: requests a second, in the mean.
        duration_seconds: of the whole trace.
        burst_factor: a burst's rate over the mean rate; 1 for none.
        burst_share: of the time that is burst.
        burst_seconds: length of a burst.
        prompt_tokens: median of short prompts.
        output_tokens: median of answers.
        sigma: standard deviation of the logarithm of both; 0 for all alike.
        long_share: of the requests whose prompt is long.
        long_tokens: least length of a long prompt.
        most_tokens: no prompt and no answer is longer.
        budget_seconds: of each request; None for none.
        seed: of all that is drawn.

    Raises:
        ValueError: a field is out of range.
    """

    rate: float
    duration_seconds: float
    burst_factor: float = 1.0
    burst_share: float = 0.2
    burst_seconds: float = 5.0
    prompt_tokens: int = 64
    output_tokens: int = 64
    sigma: float = 0.7
    long_share: float = 0.05
    long_tokens: int = 800
    most_tokens: int = 1900
    budget_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("rate", "duration_seconds", "burst_seconds", "prompt_tokens", "output_tokens", "long_tokens")
        limits = {
            **{name: (0.0, math.inf, "positive and finite") for name in positive},
            "burst_share": (0.0, 1.0, "in (0, 1)"),
        }
        for name, (low, high, said) in limits.items():
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name} is {getattr(self, name)}, must be {said}")
        if not 0 <= self.long_share <= 1:
            raise ValueError(f"long_share is {self.long_share}, must be in [0, 1]")
        if not 0 <= self.sigma <= 10:
            raise ValueError(f"sigma is {self.sigma}, must be in [0, 10]")
        if not 1 <= self.burst_factor <= 1 / self.burst_share:
            raise ValueError(
                f"burst_factor is {self.burst_factor}, must be in [1, {1 / self.burst_share:g}]: bursts for "
                f"{self.burst_share:g} of the time cannot hold more than all requests"
            )

    def arrivals(self) -> list[Arrival]:
        """Draw the trace; the same fields give the same one."""
        draw = random.Random(self.seed)
        calm_rate = self.rate * (1 - self.burst_share * self.burst_factor) / (1 - self.burst_share)
        calm_seconds = self.burst_seconds * (1 - self.burst_share) / self.burst_share
        pieces = ((calm_rate, calm_seconds), (self.rate * self.burst_factor, self.burst_seconds))
        arrivals: list[Arrival] = []
        begin = 0.0
        while begin < self.duration_seconds:
            for rate, seconds in pieces:
                end = min(begin + seconds, self.duration_seconds)
                # A Poisson process has no memory, so each piece may begin anew.
                at = begin + draw.expovariate(rate) if rate > 0 else math.inf
                while at < end:
                    arrivals.append(self._one(at, draw))
                    at += draw.expovariate(rate)
                begin = end
        return arrivals

    def _one(self, at: float, draw: random.Random) -> Arrival:
        prompt = self.prompt_tokens * draw.lognormvariate(0.0, self.sigma)
        if draw.random() < self.long_share:
            prompt = self.long_tokens * draw.paretovariate(TAIL)
        output = self.output_tokens * draw.lognormvariate(0.0, self.sigma)
        return Arrival(
            arrival_seconds=at,
            prompt_tokens=self._length(prompt),
            output_tokens=self._length(output),
            budget_seconds=self.budget_seconds,
        )

    def _length(self, tokens: float) -> int:
        return max(1, min(self.most_tokens, round(tokens)))
