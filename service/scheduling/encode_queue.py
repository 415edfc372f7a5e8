"""Whose texts an encoder reads next: the batches of the optimal split, in an order that keeps deadlines.

The order of calls is by what their tenants have had, then by priority, one more for every while of waiting, then by
deadline (without one: a minute). Where a deadline is at stake, the batch that runs next holds texts of the first call
in this order. Otherwise it is, of the batches with texts of calls as urgent, the one that brings most calls nearest to
their end for its time, which keeps the mean latency low; a call that `MAX_PASSED` batches have passed since it came has
its turn as soon as it is the first. So nobody starves.

Nothing is known here of threads, tensors or clients, and the only clock is the `now` that is handed in. Not
thread-safe.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from math import inf
from typing import Generic, TypeVar

from service.scheduling.batching import BatchCost, BatchLimits, form_batch, split
from service.scheduling.request import PATIENCE_SECONDS
from service.scheduling.shares import Shares

MAX_PASSED = 8
"""Batches that may run without the first of all calls, while no deadline is at stake."""

MAX_CANDIDATES = 1024
"""Texts that are looked at, the most urgent: enough for any length to find its like."""

_AT_STAKE = 1.5  # times the predicted time of all candidates: a deadline beyond it is kept in any order

Owner = TypeVar("Owner")
Urgency = tuple[int, int, float, float]
"""A tenant's rank, the priority turned round, when it is due, when it came."""


@dataclass(slots=True, eq=False, kw_only=True)
class Waiting(Generic[Owner]):
    """The texts of one call, and those of them that wait.

    Args:
        owner: to whom they belong.
        lengths: tokens of each text.
        arrival: when the call came, in seconds of some clock.
        deadline: when it is too late, on the same clock.
        priority: larger is more urgent.
        tenant: among whom time is shared.
    """

    owner: Owner
    lengths: Sequence[int]
    arrival: float
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""
    left: list[int] = field(init=False)
    joined: int = field(init=False, default=0)
    tokens_left: int = field(init=False)
    attended_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = list(range(len(self.lengths)))
        self.tokens_left = sum(self.lengths)
        self.attended_left = sum(length * length for length in self.lengths)

    @property
    def due(self) -> float:
        """When it should be finished."""
        return self.arrival + PATIENCE_SECONDS if self.deadline is None else self.deadline

    def seconds_left(self, cost: BatchCost) -> float:
        """Return the least time in which all that waits can be read: in one batch without padding."""
        return cost.run + self.tokens_left * cost.token + self.attended_left * cost.attended

    def take(self, indices: Collection[int]) -> None:
        """Have these wait no longer."""
        self.left = [index for index in self.left if index not in indices]
        self.tokens_left -= sum(self.lengths[index] for index in indices)
        self.attended_left -= sum(self.lengths[index] ** 2 for index in indices)


Place = tuple[Waiting[Owner], int]
"""A call, and which of its texts."""


class EncodeQueue(Generic[Owner]):
    """The calls of one encoder.

    Args:
        limits: of a batch.
        ageing: seconds after which a call counts as one priority more urgent.
    """

    def __init__(self, limits: BatchLimits, ageing: float = 10.0) -> None:
        self._limits = limits
        self._ageing = ageing
        self._calls: dict[Waiting[Owner], None] = {}  # in the order in which they came
        self._shares = Shares()
        self._formed = 0

    def add(self, call: Waiting[Owner]) -> None:
        """Take a call."""
        call.joined = self._formed
        call.tenant = self._shares.enter(call.tenant)
        self._calls[call] = None

    def remove(self, call: Waiting[Owner]) -> None:
        """Forget a call that has ended, one way or another; does nothing if it is forgotten."""
        if call in self._calls:
            del self._calls[call]
            self._shares.leave(call.tenant)

    @property
    def num_waiting(self) -> int:
        """Texts that wait."""
        return sum(len(call.left) for call in self._calls)

    def backlog(self, cost: BatchCost | None) -> tuple[int, float]:
        """Return the tokens that wait, and the seconds that they take at least; 0 while that is not known."""
        waiting = [call for call in self._calls if call.left]
        seconds = 0.0 if cost is None else sum(call.seconds_left(cost) - cost.run for call in waiting)
        return sum(call.tokens_left for call in waiting), seconds

    def waiting_lengths(self) -> list[int]:
        """Return the lengths of the texts that wait, up to `MAX_CANDIDATES` of them."""
        return [call.lengths[index] for call, index in islice(_places(self._calls), MAX_CANDIDATES)]

    @property
    def first_due(self) -> float:
        """The earliest deadline of the calls that wait."""
        return min((call.deadline for call in self._calls if call.left and call.deadline is not None), default=inf)

    def drop_hopeless(self, now: float, cost: BatchCost) -> list[Waiting[Owner]]:
        """Forget and return the calls that cannot be in time even if they are next; a call that is alone may try."""
        waiting = [call for call in self._calls if call.left]
        if len(waiting) < 2:
            return []
        hopeless = [
            call for call in waiting if call.deadline is not None and now + call.seconds_left(cost) > call.deadline
        ]
        for call in hopeless:
            self.remove(call)
        return hopeless

    def seconds_to_finish(self, call: Waiting[Owner], now: float, cost: BatchCost) -> float:
        """Return the predicted time until a call that is yet to be added is finished, once the encoder is free.

        What is more urgent goes before it. Of very many texts every n-th stands for all.
        """
        urgency = self._urgency(now)
        ahead = [other for other in self._calls if urgency(other) <= urgency(call)]
        lengths = [found.lengths[index] for found, index in _places([call, *ahead])]
        step = -(-len(lengths) // MAX_CANDIDATES)
        return step * sum(batch.seconds for batch in split(sorted(lengths[::step]), cost, self._limits))

    def next_batch(self, now: float, cost: BatchCost | None) -> list[Place[Owner]]:
        """Take the texts that are to run together now; empty if none waits.

        Args:
            now: the time.
            cost: of batches, or None while it is not known: then as many as fit run with the most urgent text.
        """
        urgency = self._urgency(now)
        order = sorted((call for call in self._calls if call.left), key=urgency)
        places = list(islice(_places(order), MAX_CANDIDATES))
        if not places:
            return []
        lengths = [call.lengths[index] for call, index in places]
        if cost is None:
            batch = [places[rank] for rank in form_batch(lengths, self._limits)]
        else:
            batch = self._choose(places, now, cost, urgency)
        self._formed += 1
        taken: dict[Waiting[Owner], set[int]] = {}
        for call, index in batch:
            taken.setdefault(call, set()).add(index)
        for call, indices in taken.items():
            call.take(indices)
        return batch

    def _choose(
        self, places: Sequence[Place[Owner]], now: float, cost: BatchCost, urgency: Callable[[Waiting[Owner]], Urgency]
    ) -> list[Place[Owner]]:
        """Return the best batch of the optimal split; the first place is of the first call."""
        ordered = sorted(places, key=lambda place: place[0].lengths[place[1]])
        batches = split([call.lengths[index] for call, index in ordered], cost, self._limits)
        safe = now + _AT_STAKE * sum(batch.seconds for batch in batches)
        first, calls = places[0][0], {call for call, _ in places}
        at_stake = any(call.deadline is not None and call.deadline < safe for call in calls)
        if at_stake or self._formed - first.joined >= MAX_PASSED:
            turn = {first}
        else:
            turn = {call for call in calls if urgency(call)[:2] == urgency(first)[:2]}
        found: list[Place[Owner]] = []
        most = -1.0
        for batch in batches:
            members = ordered[batch.first : batch.last]
            calls_ended = sum(1 / len(call.left) for call, _ in members)
            if calls_ended > most * batch.seconds and not turn.isdisjoint(call for call, _ in members):
                found, most = list(members), calls_ended / batch.seconds if batch.seconds else inf
        return found

    def charge(self, batch: Sequence[Place[Owner]], seconds: float) -> None:
        """Count the time of a batch for the tenants of those in it who are still here."""
        for call, _ in batch:
            if call in self._calls:
                self._shares.charge(call.tenant, seconds / len(batch))

    def _urgency(self, now: float) -> Callable[[Waiting[Owner]], Urgency]:
        """Return what tells of a call what calls are ordered by; the lowest goes first."""
        ranks = self._shares.ranks()

        def urgency(call: Waiting[Owner]) -> Urgency:
            aged = int((now - call.arrival) / self._ageing)
            return ranks.get(call.tenant, 0), -(call.priority + aged), call.due, call.arrival

        return urgency


def _places(calls: Iterable[Waiting[Owner]]) -> Iterable[Place[Owner]]:
    return chain.from_iterable(((call, index) for index in call.left) for call in calls)
