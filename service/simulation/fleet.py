"""Many replicas behind a router, in virtual time: events in a heap, one for each replica that is at work."""

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from service.simulation.replica import Effort, Machine, Outcome, Replica
from service.simulation.trace import Arrival

Routing = Literal["round-robin", "least-loaded", "two-choices"]
"""How a request finds its replica: in turn; where the fewest requests are; the emptier one of two drawn at random."""

ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(frozen=True, slots=True)
class Run:
    """What a fleet made of a trace."""

    outcomes: tuple[Outcome, ...]
    efforts: tuple[Effort, ...]

    @property
    def seconds(self) -> float:
        """From the first arrival until the last request ended."""
        first = min(outcome.arrival.arrival_seconds for outcome in self.outcomes)
        return max(outcome.ended_seconds for outcome in self.outcomes) - first


class Fleet:
    """Replicas that are all alike.

    Args:
        machine: each of them.
        num_replicas: at least 1.
        routing: how requests find theirs.
        seed: of the router's draws.
    """

    def __init__(
        self, machine: Machine, num_replicas: int = 1, *, routing: Routing = "least-loaded", seed: int = 0
    ) -> None:
        self._replicas = [Replica(machine) for _ in range(num_replicas)]
        self._loads = [0] * num_replicas  # requests that each has, as the router knows it
        self._routing = routing
        self._draw = random.Random(seed)
        self._next = 0
        self._turns: list[tuple[float, int]] = []

    def run(self, arrivals: Iterable[Arrival]) -> Run:
        """Let a trace, in order of its arrivals, run until every request has ended in one way.

        Requests that come at one instant all come before the steps that begin then.
        """
        outcomes = []
        for number, arrival in enumerate(arrivals, start=1):
            while self._turns and self._turns[0][0] < arrival.arrival_seconds:
                self._turn()
            outcome = Outcome(arrival)
            outcomes.append(outcome)
            self._submit(outcome, number)
        while self._turns:
            self._turn()
        return Run(tuple(outcomes), tuple(replica.effort for replica in self._replicas))

    def _submit(self, outcome: Outcome, number: int) -> None:
        index = self._route()
        replica = self._replicas[index]
        if not replica.submit(outcome, number):
            return
        self._loads[index] = replica.num_requests
        if replica.is_idle:
            replica.is_idle = False
            heapq.heappush(self._turns, (outcome.arrival.arrival_seconds, index))

    def _turn(self) -> None:
        now, index = self._turns[0]
        replica = self._replicas[index]
        until = replica.turn(now)
        self._loads[index] = replica.num_requests
        if until is None:
            heapq.heappop(self._turns)
        else:
            heapq.heapreplace(self._turns, (until, index))

    def _route(self) -> int:
        loads = self._loads
        if self._routing == "least-loaded":
            return loads.index(min(loads))
        if self._routing == "two-choices":
            one, other = self._draw.randrange(len(loads)), self._draw.randrange(len(loads))
            return one if loads[one] <= loads[other] else other
        self._next = (self._next + 1) % len(loads)
        return self._next - 1


def simulate(
    machine: Machine,
    arrivals: Sequence[Arrival],
    num_replicas: int = 1,
    *,
    routing: Routing = "least-loaded",
    seed: int = 0,
) -> Run:
    """Run a trace, in order of its arrivals, through a new fleet."""
    return Fleet(machine, num_replicas, routing=routing, seed=seed).run(arrivals)
