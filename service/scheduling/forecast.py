"""When requests will be finished, foreseen from what lengths cost and from how long answers turn out to be.

Everything here is an estimate, in seconds from now. Reading is done by one request after the other, decoding by all
that run together, so a step gets slower with everyone who joins: who joins, and who is turned away, depends on what
that does to the deadlines of the others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import inf

from service.scheduling.config import SchedulerConfig
from service.scheduling.output_lengths import OutputLengths
from service.scheduling.request import Request
from service.scheduling.work import Predict, Work, encode_work

QUANTILE = 0.5
"""Of the lengths of answers: half of them are longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one request has still to do.

    Args:
        reading: seconds of its source and its prompt.
        steps: in which it then decodes.
        rows: that it has in each of them.
        context: tokens of each row, on average over these steps.
    """

    reading: float
    steps: int
    rows: int
    context: float


@dataclass(frozen=True, slots=True)
class Due:
    """A load, and the seconds that are left for it."""

    load: Load
    slack: float = inf


class Forecast:
    """What a scheduler foresees.

    Args:
        predict: seconds of a run of a graph, or None while that is not known.
        config: of the scheduler.
    """

    def __init__(self, predict: Predict, config: SchedulerConfig) -> None:
        self._predict = predict
        self._config = config
        self.lengths = OutputLengths()

    def load(
        self, request: Request, num_computed: int = 0, num_output: int = 0, *, encoded: bool = False
    ) -> Load | None:
        """Return what is left of a request, or None while too little is known.

        Args:
            request: it.
            num_computed: positions that are there already.
            num_output: tokens that it has got.
            encoded: whether its source has been read.
        """
        remaining = self.lengths.remaining(request.max_tokens, num_output, QUANTILE)
        if remaining is None:
            return None
        reading: float | None = 0.0
        if request.source is not None and not encoded:
            reading = self._predict("encode", encode_work(1, max(1, len(request.source.token_ids))))
        num_prompt = max(0, len(request.prompt) - num_computed) if num_output == 0 else 0
        if self._config.prefill_chunk == 1 or num_prompt <= 1:
            remaining += max(0, num_prompt - 1)
        elif reading is not None:
            prefill = self._prefill_seconds(num_computed, num_prompt)
            reading = None if prefill is None else reading + prefill
        if reading is None:
            return None
        written = len(request.prompt) + num_output
        return Load(reading=reading, steps=remaining, rows=request.num_slots, context=written + remaining / 2)

    def _prefill_seconds(self, start: int, num_tokens: int) -> float | None:
        chunk = self._config.prefill_chunk or self._config.chunk_tokens
        runs = -(-num_tokens // chunk)
        return self._predict("prefill", Work(runs, num_tokens, num_tokens * (start + num_tokens / 2)))

    def step_seconds(self, loads: Iterable[Load]) -> float | None:
        """Return how long a step takes in which all of these decode."""
        rows = attended = 0.0
        for load in loads:
            rows += load.rows
            attended += load.rows * load.context
        return self._predict("decode", Work(1, rows, attended)) if rows else 0.0

    def alone(self, load: Load) -> float | None:
        """Return the seconds that a request takes if it has the engine for itself: it cannot be faster."""
        step = self.step_seconds([load])
        return None if step is None else load.reading + load.steps * step

    def finish(self, own: Load, running: Sequence[Load], ahead: Sequence[Load]) -> float | None:
        """Return the seconds until `own` is finished, with these running and these waiting before it.

        Few rows are fast and leave others waiting, many are slow: it is taken to run among as many as are best for it.
        """
        present = sum(load.rows for load in running)
        widths = {1 << exponent for exponent in range(self._config.num_slots.bit_length())} | {self._config.num_slots}
        usable = sorted(width for width in widths if present <= width <= self._config.num_slots) or [present]
        found = [self._finish_among(width, own, running, ahead) for width in usable]
        known = [seconds for seconds in found if seconds is not None]
        return min(known) if known else None

    def wait(self, running: Sequence[Load], ahead: Sequence[Load]) -> float:
        """Return the seconds until one more request would begin, behind these; 0 if that is not known."""
        begins = Load(reading=0.0, steps=0, rows=1, context=0.0)
        return self._finish_among(self._config.num_slots, begins, running, ahead) or 0.0

    def _finish_among(self, width: int, own: Load, running: Sequence[Load], ahead: Sequence[Load]) -> float | None:
        """Return the same with at most `width` rows at once: who waits begins when another ends, in order."""
        everyone = [*running, *ahead, own]
        step = self.step_seconds(everyone[:width])
        if step is None:
            return None
        ends = [0] * width
        for load in (*running, *ahead):
            for _ in range(load.rows):
                heapreplace(ends, ends[0] + load.steps)
        for _ in range(own.rows - 1):
            heapreplace(ends, ends[0])
        reading = sum(load.reading for load in everyone)
        return reading + (ends[0] + own.steps) * step

    def joins(self, candidate: Due, running: Sequence[Due]) -> bool:
        """Return whether one more can run so that it and all that would be in time still are."""
        before, after = self._times(running), self._times([*running, candidate])
        if after is None:
            return True
        if after[-1] > candidate.slack:
            return False
        in_time = (then <= due.slack for then, due in zip(before or after, running, strict=False))
        return all(
            later <= due.slack or not was_in_time
            for later, due, was_in_time in zip(after, running, in_time, strict=False)
        )

    def _times(self, dues: Sequence[Due]) -> list[float] | None:
        """Return when each of these is finished if all run together."""
        step = self.step_seconds(due.load for due in dues)
        if step is None:
            return None
        reading = sum(due.load.reading for due in dues)
        target = self._config.inter_token_target
        room = max(target - step, target / 4) if target else inf  # seconds of reading in a step that decodes, too
        slowed = 1 + step / room if any(not due.load.reading for due in dues) else 1.0
        return [
            (reading * slowed if due.load.reading else min(reading, due.load.steps * room)) + due.load.steps * step
            for due in dues
        ]

    def chunk_tokens(self, decode_seconds: float, start: int, most: int) -> int | None:
        """Return how many prompt tokens fit beside a decode so that the step keeps the inter-token target.

        Args:
            decode_seconds: of the rows that decode.
            start: positions before the chunk.
            most: tokens that are of use.
        """
        left = self._config.inter_token_target - decode_seconds
        low, high = 0, -(-most // CHUNK_UNIT)
        while low < high:
            middle = (low + high + 1) // 2
            tokens = middle * CHUNK_UNIT
            seconds = self._predict("prefill", Work(1, tokens, tokens * (start + tokens / 2)))
            if seconds is None:
                return None
            low, high = (middle, high) if seconds <= left else (low, middle - 1)
        return max(CHUNK_UNIT, low * CHUNK_UNIT)


CHUNK_UNIT = 32
"""Prompt tokens of the smallest chunk, and what others are multiples of: below it a run costs about the same."""
