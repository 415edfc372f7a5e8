"""The request sets that benchmarks run, and how fast they ran."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

VOCAB = 49152
"""SmolLM2's; prompts are random token ids, because speed does not depend on what they mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A closed loop: `streams` callers, each sending its next request when the last one has ended.

    Lengths are in tokens; every answer has exactly `output_tokens`, since end tokens are ignored.
    """

    name: str
    streams: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    vocab_size: int = VOCAB

    def prompts(self) -> list[tuple[int, ...]]:
        """Return the prompts, the same ones every time."""
        rng = random.Random(self.name)
        lengths = [self.prompt_tokens] * self.requests
        return [tuple(rng.randrange(3, self.vocab_size) for _ in range(length)) for length in lengths]

    @property
    def generated_tokens(self) -> int:
        """Tokens that all answers have together."""
        return self.requests * self.output_tokens


WORKLOADS = (
    Workload(name="1 stream, greedy", streams=1, requests=3, prompt_tokens=64, output_tokens=96),
    Workload(name="16 streams, greedy", streams=16, requests=48, prompt_tokens=64, output_tokens=96),
    Workload(name="32 streams, greedy", streams=32, requests=64, prompt_tokens=64, output_tokens=96),
    Workload(
        name="16 streams, temperature 0.8, top_p 0.95",
        streams=16,
        requests=48,
        prompt_tokens=64,
        output_tokens=96,
        temperature=0.8,
        top_p=0.95,
    ),
    Workload(name="16 streams, 1000-token prompts", streams=16, requests=16, prompt_tokens=1000, output_tokens=64),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of repeated runs."""

    values: tuple[float, ...]

    @property
    def best(self) -> float:
        """The fastest run: what the code can do when the machine lets it."""
        return max(self.values)

    @property
    def median(self) -> float:
        """The middle run: what it did."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.best:7.0f} best {self.median:7.0f} median"


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios of runs that alternated."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
