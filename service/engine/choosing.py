"""What chooses a step's tokens from its logits, wherever they lie, and knows how long its parts took.

The engine hands over what each run left and says of which rows a token is wanted. The host's chooser looks at once, for
the next run may use the memory again. The device's waits until all of a step was launched, so that the host waits for
the device once a step.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypeVar

from service.engine.device_graph import DeviceGraph
from service.engine.device_sampler import DeviceSampler
from service.engine.graph import Logits
from service.engine.sampling import NotFinite, Sampler, check_finite
from service.scheduling.plan import Sample
from service.scheduling.request import Token

logger = logging.getLogger(__name__)

Rows_contra = TypeVar("Rows_contra", contravariant=True)


Wanted = tuple[str, int, Sample | None]
"""Whose a row is: request, slot, and for which choice, if a token is to be chosen from it."""


@dataclass(slots=True)
class Outcome:
    """What has come of a step so far: tokens by slot, failures by request."""

    tokens: dict[int, Token] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def put(self, wanted: Wanted, choice: Token | NotFinite | None) -> None:
        """Note what came of a row; a prompt whose logits are not finite on the way need not go on."""
        request_id, slot, _ = wanted
        if isinstance(choice, Token):
            self.tokens[slot] = choice
        elif choice is not None:
            logger.error("request %s: %s", request_id, choice)
            self.failures[request_id] = str(choice)


class Chooser(Protocol[Rows_contra]):
    """Chooses tokens from what a graph says of its logits, step by step."""

    @property
    def waits(self) -> bool:
        """Whether the host has nothing to do while a step is computed."""

    def turn(self) -> AbstractContextManager[None]:
        """Return what to hold during a step."""

    def prepare(self) -> None:
        """Do what has to be done once, on the thread that is to run steps, while all slots are free."""

    def start(self) -> None:
        """Begin a step."""

    def mark(self) -> None:
        """End a part of it."""

    def take(self, rows: Rows_contra, wanted: Mapping[int, Wanted], outcome: Outcome) -> None:
        """Take over the logits of a run; `wanted` says of which of its rows, counted from 0, something is to come."""

    def finish(self, outcome: Outcome, meanwhile: Callable[[], object]) -> list[float]:
        """Note the rest of what came of the step, and return the seconds of its parts.

        `meanwhile` is called while a device computes, if there is one.
        """


class HostChooser:
    """Chooses from arrays of the host, row by row.

    Args:
        vocab_size: logits of a row.
        clock: monotonic seconds.
    """

    waits = False

    def __init__(self, vocab_size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sampler = Sampler(vocab_size)
        self._clock = clock
        self._times: list[float] = []

    def turn(self) -> AbstractContextManager[None]:
        """Return nothing to speak of."""
        return nullcontext()

    def prepare(self) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Begin a step."""
        self._times = [self._clock()]

    def mark(self) -> None:
        """End a part of it."""
        self._times.append(self._clock())

    def take(self, rows: Logits, wanted: Mapping[int, Wanted], outcome: Outcome) -> None:
        """Choose at once."""
        best = rows.argmax(axis=1).tolist()
        for row, one in wanted.items():
            _, slot, sample = one
            try:
                if sample is None:
                    check_finite(rows[row], best[row])
                else:
                    outcome.tokens[slot] = self._sampler.choose(rows[row], best[row], sample)
            except NotFinite as error:
                outcome.put(one, error)

    def finish(self, outcome: Outcome, meanwhile: Callable[[], object]) -> list[float]:
        """Return the seconds of the step's parts."""
        return [end - start for start, end in pairwise(self._times)]


class DeviceChooser:
    """Chooses from the rows of a device's logits, all of a step's at its end.

    Args:
        graph: what makes the logits.
        sampler: chooses from them where they are.
        clock: monotonic seconds.
    """

    waits = True

    def __init__(
        self, graph: DeviceGraph, sampler: DeviceSampler, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._graph, self._sampler, self._device = graph, sampler, graph.device
        self._clock = clock
        self._started = 0.0
        self._events = [graph.device.event()]
        self._num_events = 0
        self._wanted: dict[int, Wanted] = {}

    def turn(self) -> AbstractContextManager[None]:
        """Return what keeps others from capturing meanwhile."""
        return self._device.turns.together()

    def prepare(self) -> None:
        """Capture the runs of every size, of the graph and of the sampler."""
        # To be alone is waited for until nobody loads, and all others would wait behind that.
        with self._device.loading:
            self._graph.capture()
            self._sampler.capture()

    def start(self) -> None:
        """Begin a step, from the first row of the logits."""
        self._started = self._clock()
        self._graph.take()
        self._wanted.clear()
        self._num_events = 0
        self.mark()

    def mark(self) -> None:
        """End a part of it, where the device will be then."""
        if self._num_events == len(self._events):
            self._events.append(self._device.event())
        self._device.record(self._events[self._num_events])
        self._num_events += 1

    def take(self, rows: range, wanted: Mapping[int, Wanted], outcome: Outcome) -> None:
        """Remember what is wanted."""
        first = rows.start
        self._wanted.update(wanted if first == 0 else {first + row: one for row, one in wanted.items()})

    def finish(self, outcome: Outcome, meanwhile: Callable[[], object]) -> list[float]:
        """Choose, wait for the device, and divide the step's time as the device divided its own."""
        wanted = [self._wanted.get(row) for row in self._graph.take()]
        samples = [None if one is None else one[2] for one in wanted]
        nothing = [0.0] * (self._num_events - 1)
        if not wanted:
            meanwhile()
            return nothing
        try:
            self._sampler.launch(samples)
        except Exception:
            self._one_by_one(outcome)
            return nothing
        meanwhile()
        try:
            choices = self._sampler.collect()
            if not any(samples):  # then nobody has waited
                self._device.synchronize()
            parts = [self._device.seconds(*pair) for pair in pairwise(self._events[: self._num_events])]
        except Exception:
            self._one_by_one(outcome)
            return nothing
        for one, choice in zip(wanted, choices, strict=True):
            if one is not None:
                outcome.put(one, choice)
        seconds, whole = self._clock() - self._started, sum(parts)
        return [seconds * part / whole for part in parts] if whole > 0 else nothing

    def _one_by_one(self, outcome: Outcome) -> None:
        logger.exception("choosing for %d rows failed; trying them one by one", len(self._wanted))
        for row, one in self._wanted.items():
            request_id, slot, sample = one
            try:
                outcome.put(one, self._sampler.choose([None] * row + [sample])[row])
                self._device.synchronize()
            except Exception as error:
                logger.exception("request %s failed in slot %d", request_id, slot)
                outcome.failures[request_id] = f"choosing a token failed ({type(error).__name__})"
