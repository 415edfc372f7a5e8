"""One machine of a fleet: the scheduler that serves, in virtual time, and what it makes of each request.

It does what `EngineLoop` does: commands are taken between two steps, a full queue turns requests away at once, a client
that hangs up frees its slot before the next step.
"""

import heapq
import zlib
from dataclasses import dataclass, field
from enum import Enum

from service.scheduling.config import SchedulerConfig
from service.scheduling.plan import Event, RefusalEvent, StepPlan, StepResult, TokenEvent
from service.scheduling.request import Request
from service.scheduling.scheduler import Scheduler
from service.simulation.trace import Arrival
from service.simulation.virtual_engine import ENDS, Laws, VirtualEngine


class Ending(Enum):
    """The ways in which a request can end."""

    FINISHED = "finished"
    REFUSED = "refused"  # it would not have been finished in time
    EXPIRED = "expired"  # its time was over
    HUNG_UP = "hung up"  # its client did not wait any longer
    QUEUE_FULL = "queue full"
    TOO_LONG = "too long"


@dataclass(slots=True)
class Outcome:
    """What became of one arrival; times in seconds after the beginning of the trace."""

    arrival: Arrival
    ending: Ending | None = None
    ended_seconds: float = 0.0
    first_token_seconds: float | None = None
    gaps: list[float] = field(default_factory=list)

    @property
    def is_on_time(self) -> bool:
        """Whether it was finished before it was of no use any more."""
        return self.ending is Ending.FINISHED and self.ended_seconds <= self.arrival.due_seconds

    @property
    def num_tokens(self) -> int:
        """Tokens that it got."""
        return len(self.gaps) + (self.first_token_seconds is not None)

    @property
    def ttft(self) -> float | None:
        """Seconds until its first token."""
        return None if self.first_token_seconds is None else self.first_token_seconds - self.arrival.arrival_seconds

    @property
    def e2e(self) -> float | None:
        """Seconds until it was finished, if it was."""
        finished = self.ending is Ending.FINISHED
        return self.ended_seconds - self.arrival.arrival_seconds if finished else None

    @property
    def wait_seconds(self) -> float:
        """Seconds until something happened to it: its first token, or its end without one."""
        at = self.ended_seconds if self.first_token_seconds is None else self.first_token_seconds
        return at - self.arrival.arrival_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What every replica of a fleet is.

    Args:
        config: of its scheduler.
        laws: what its steps cost.
        overhead_seconds: of a step beside its runs.
        max_waiting_requests: beyond its slots, before more are turned away.
        sends_deadlines: whether the server is told when a request is of no use any more; otherwise its client hangs
            up then.
    """

    config: SchedulerConfig
    laws: Laws
    overhead_seconds: float = 0.0
    max_waiting_requests: int = 256
    sends_deadlines: bool = True


@dataclass(slots=True)
class Effort:
    """What a replica did, in sums."""

    busy_seconds: float = 0.0
    steps: int = 0
    real_tokens: int = 0
    padding_tokens: int = 0


class Replica:
    """One machine; whoever runs it calls `turn` when it said, and whenever it was idle and got a request."""

    def __init__(self, machine: Machine) -> None:
        self.effort = Effort()
        self.is_idle = True
        self._machine = machine
        self._scheduler = Scheduler(machine.config, machine.laws.predict)
        self._engine = VirtualEngine(machine.laws)
        self._outcomes: dict[str, Outcome] = {}
        self._hang_ups: list[tuple[float, str]] = []
        self._running: tuple[StepPlan, StepResult] | None = None

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._outcomes)

    def submit(self, outcome: Outcome, number: int) -> bool:
        """Take a request now, the `number`th of the trace, or end it at once; return whether it was taken."""
        arrival = outcome.arrival
        request = self._request(arrival, number)
        if not self._scheduler.fits(request):
            return self._end_at_once(outcome, Ending.TOO_LONG)
        if len(self._outcomes) >= self._machine.config.num_slots + self._machine.max_waiting_requests:
            return self._end_at_once(outcome, Ending.QUEUE_FULL)
        self._outcomes[request.request_id] = outcome
        self._engine.expect(request, arrival.output_tokens)
        self._scheduler.add(request)
        if arrival.budget_seconds is not None and not self._machine.sends_deadlines:
            heapq.heappush(self._hang_ups, (arrival.due_seconds, request.request_id))
        return True

    def turn(self, now: float) -> float | None:
        """End the step that runs, begin the next one, and return when it ends; None if there is nothing to do."""
        self._hang_up(now)
        if self._running is not None:
            self._record(self._scheduler.update(*self._running, now), now)
            self._running = None
        self._record(self._scheduler.expire(now), now)
        self.is_idle = not self._scheduler.has_work
        if self.is_idle:
            return None
        plan = self._scheduler.schedule(now)
        result = self._engine.execute(plan)
        self._running = plan, result
        seconds = self._machine.overhead_seconds + result.decode_seconds + result.prefill_seconds
        assert seconds > 0, f"a step at {now} s does nothing: {plan}"
        self._count(plan, seconds)
        return now + seconds

    def _end_at_once(self, outcome: Outcome, ending: Ending) -> bool:
        outcome.ending, outcome.ended_seconds = ending, outcome.arrival.arrival_seconds
        return False

    def _request(self, arrival: Arrival, number: int) -> Request:
        deadline = None
        if self._machine.sends_deadlines and arrival.budget_seconds is not None:
            deadline = arrival.due_seconds
        return Request(
            request_id=str(number),
            prompt=_prompt(arrival, number),
            max_tokens=arrival.max_tokens or arrival.output_tokens,
            eos_token_ids=_ENDS,
            priority=arrival.priority,
            tenant=arrival.tenant,
            arrival=arrival.arrival_seconds,
            deadline=deadline,
        )

    def _hang_up(self, now: float) -> None:
        while self._hang_ups and self._hang_ups[0][0] < now:
            at, name = heapq.heappop(self._hang_ups)
            if name in self._outcomes:
                self._scheduler.cancel(name)
                self._end(name, Ending.HUNG_UP, at)

    def _record(self, events: list[Event], now: float) -> None:
        for event in events:
            name = event.request.request_id
            if not isinstance(event, TokenEvent):
                self._end(name, Ending.REFUSED if isinstance(event, RefusalEvent) else Ending.EXPIRED, now)
                continue
            outcome = self._outcomes[name]
            if event.is_first:
                outcome.first_token_seconds = now
            else:
                outcome.gaps.append(event.gap_seconds)
            if event.finish is not None:
                self._end(name, Ending.FINISHED, now)

    def _end(self, name: str, ending: Ending, at: float) -> None:
        self._engine.forget(name)
        outcome = self._outcomes.pop(name)
        assert outcome.ending is None, f"request {name} has ended before: {outcome}"
        outcome.ending, outcome.ended_seconds = ending, at

    def _count(self, plan: StepPlan, seconds: float) -> None:
        parked = sum(row.request_id is None for row in plan.rows)
        self.effort.busy_seconds += seconds
        self.effort.steps += 1
        self.effort.padding_tokens += parked + plan.prompt_padding
        self.effort.real_tokens += len(plan.rows) - parked + sum(len(chunk.token_ids) for chunk in plan.reads)


_ENDS = frozenset({ENDS})


def _prompt(arrival: Arrival, number: int) -> tuple[int, ...]:
    """Return tokens that only prompts of the same group share, and only their first ones."""
    shared = arrival.prefix_tokens if arrival.prefix_group else 0
    group = 2 * zlib.crc32(arrival.prefix_group.encode()) + 1
    return (group,) * shared + (2 * number,) * (arrival.prompt_tokens - shared)
