"""Steps one after the other: the scheduler plans them, the engine carries them out, the scheduler hears of it.

While a device computes a step, the next one is planned, before the tokens are known: who turns out to have ended is
taken out of that plan, and who comes meanwhile is in the one after it. Where the processor computes there is no such
time, and a step is planned when the last one is over.
"""

from collections.abc import Callable
from typing import NamedTuple

from service.engine.engine import Engine
from service.scheduling.plan import Event, StepPlan, StepResult
from service.scheduling.scheduler import Scheduler


class Step(NamedTuple):
    """What was done, what was made of it, and what that means for whom."""

    plan: StepPlan
    result: StepResult
    events: list[Event]


class Pipeline:
    """Runs the steps of a scheduler on an engine. Requests may be added and cancelled between two steps.

    Args:
        scheduler: plans.
        engine: carries out.
        clock: seconds of the clock that requests are dated by.
    """

    def __init__(self, scheduler: Scheduler, engine: Engine, clock: Callable[[], float]) -> None:
        self._scheduler, self._engine, self._clock = scheduler, engine, clock
        self._ahead: StepPlan | None = None

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do: for a request, or that was decided when one was here."""
        return self._ahead is not None or self._scheduler.has_work

    def step(self, meanwhile: Callable[[], object] = lambda: None) -> Step:
        """Carry out what was planned, or what is to be done now.

        Args:
            meanwhile: is called once a device, if there is one, has all to do that the step asks for.

        Raises:
            EngineBroken: nothing of the step succeeded, nor would anything else.
        """
        now = self._clock()
        events = self._scheduler.expire(now)
        plan = self._planned() or self._scheduler.schedule(now)

        def plan_ahead() -> None:
            meanwhile()
            if self._engine.waits and self._scheduler.can_plan_ahead:
                self._scheduler.advance(plan)
                self._ahead = self._scheduler.schedule(self._clock())

        result = self._engine.execute(plan, plan_ahead)
        events += self._scheduler.update(plan, result, self._clock())
        self._ahead = self._planned()
        return Step(plan, result, events)

    def _planned(self) -> StepPlan | None:
        """Return what is left of the plan that was made ahead; others may have ended since this was last asked."""
        planned, self._ahead = self._ahead, None
        return None if planned is None else self._scheduler.still_to_do(planned)
