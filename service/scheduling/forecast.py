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
from service.scheduling.row_buckets import bucket_of
from service.scheduling.work import Predict, Work, encode_work, prefill_work

CHUNK_UNIT = 32
"""Prompt tokens of the smallest chunk, and what others are multiples of: below it a run costs about the same."""

QUANTILE = 0.5
"""Of the lengths of answers: half of them are longer."""

MARGIN = 0.2
"""Of what a request still needs, which must be left over when another joins. Without it one in ten of those who had
joined was late after all, with a third too few join (virtual time, a heavy-tailed mix at 0.5 to 1.2 of capacity)."""

LENT = 0.5
"""Of what the running can spare, which one step may use up for reading: more prompts come after this one."""


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
        num_rows, attended = 0, 0.0
        for load in loads:
            num_rows += load.rows
            attended += load.rows * load.context
        return self.decode_seconds(num_rows, attended) if num_rows else 0.0

    def decode_seconds(self, num_rows: int, attended: float) -> float | None:
        """Return how long so many rows take that read so many positions; parked ones that fill a bucket run, too."""
        return self._predict("decode", Work(1, bucket_of(num_rows, self._config.row_buckets), attended))

    def alone(self, load: Load) -> float | None:
        """Return the seconds that a request takes if it has the engine for itself: it cannot be faster."""
        step = self.step_seconds([load])
        return None if step is None else load.reading + load.steps * step

    def finish(self, own: Due, running: Sequence[Due], ahead: Sequence[Load]) -> float | None:
        """Return the seconds until `own` is finished, with these running and these waiting before it.

        Few rows are fast and leave others waiting, many are slow: it is taken to run among as many as are best for it.
        """
        present = sum(due.load.rows for due in running)
        num_slots = self._config.num_slots
        widths = {1 << exponent for exponent in range(num_slots.bit_length())} | {num_slots}
        reading = own.load.reading + sum(load.reading for load in ahead)
        reading += sum(due.load.reading for due in running if due.slack < own.slack)
        before = [*(due.load for due in running), *ahead]
        found = [
            decoding
            for width in widths
            if present <= width <= num_slots and (decoding := self._decoding_among(width, own.load, before)) is not None
        ]
        return reading + min(found) if found else None

    def wait(self, running: Sequence[Load], ahead: Sequence[Load]) -> float:
        """Return the seconds until one more request would begin, behind these; 0 if that is not known."""
        begins = Load(reading=0.0, steps=0, rows=1, context=0.0)
        before = [*running, *ahead]
        decoding = self._decoding_among(self._config.num_slots, begins, before)
        return 0.0 if decoding is None else decoding + sum(load.reading for load in before)

    def _decoding_among(self, width: int, own: Load, before: Sequence[Load]) -> float | None:
        """Return the seconds of steps of at most `width` rows until `own` ends; who waits begins when another ends."""
        step = self.step_seconds([*before, own][:width])
        if step is None:
            return None
        ends = [0] * width
        for load in before:
            for _ in range(load.rows):
                heapreplace(ends, ends[0] + load.steps)
        for _ in range(own.rows - 1):
            heapreplace(ends, ends[0])
        return (ends[0] + own.steps) * step

    def joins(self, candidate: Due, running: Sequence[Due]) -> bool:
        """Return whether one more can run so that it is in time, and all others who can still be so are, too.

        Nothing runs exactly as foreseen, and who has joined stays: so a margin is kept.
        """
        dues = [due for due in (*running, candidate) if due.slack < inf]
        spare = self.laxities([*running, candidate])
        if spare is None:
            return True
        finite = [seconds for seconds in spare if seconds < inf]
        return all(
            seconds >= MARGIN * (due.slack - seconds) or self._is_lost(due)
            for due, seconds in zip(dues, finite, strict=True)
        )

    def _is_lost(self, due: Due) -> bool:
        """Return whether a request would be late even if it had the engine for itself from now on."""
        alone = self.alone(due.load)
        return alone is not None and alone > due.slack

    def laxities(self, dues: Sequence[Due]) -> list[float] | None:
        """Return the seconds that each of these can spare if all run together; who is late has less than none.

        Who can spare least reads first, so one waits for the reading of those who can spare less, and for its own.
        """
        step = self.step_seconds(due.load for due in dues)
        if step is None:
            return None
        spare = [due.slack - due.load.steps * step - due.load.reading for due in dues]
        read = 0.0
        for index in sorted(range(len(dues)), key=spare.__getitem__):
            spare[index] -= read
            read += dues[index].load.reading
        return spare

    def chunk_tokens(self, seconds: float, start: int, most: int) -> int | None:
        """Return how many prompt tokens can be read in so many seconds, in units; None while that is not known.

        Args:
            seconds: there are.
            start: positions before the chunk.
            most: tokens that are of use.
        """
        low, high = 0, -(-most // CHUNK_UNIT)
        while low < high:
            middle = (low + high + 1) // 2
            taken = self._predict("prefill", prefill_work(start, middle * CHUNK_UNIT))
            if taken is None:
                return None
            low, high = (middle, high) if taken <= seconds else (low, middle - 1)
        return low * CHUNK_UNIT
