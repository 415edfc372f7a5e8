"""One encoder's thread, and the calls through which the event loop talks to it.

As in `engine_loop`, the event loop submits and the thread works: it takes those of the waiting texts or images that the
queue chooses, runs them as a batch, makes of each result what its task asks for, and hands all of the batch back in one
`call_soon_threadsafe`. Items of one call may run in different batches; the call ends with its last item.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar, cast

import numpy as np

from attendant.bundle import Check, Manifest
from service.bundle import FoundBundle, verify_files
from service.bundle_thread import BundleThread
from service.engine.encode_graph import Array, EncodeGraph, Item
from service.engine.encode_self_test import check_encoder
from service.engine.probe import Probe, encoder_probe
from service.engine.runtime import use_threads
from service.errors import AttendantError, DeadlineExceeded, DeadlineUnreachable, ExecutionFailed, QueueFull
from service.metrics import ModelMetrics
from service.scheduling.batch_delay import Arrivals, Company, best_delay
from service.scheduling.batching import BatchCost, BatchLimits
from service.scheduling.encode_queue import EncodeQueue, Waiting
from service.scheduling.latency import LatencyModel
from service.scheduling.work import encode_work

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Finish = Callable[[Array], Result]
"""A task's own last step: makes an answer of what the graph made of one item, on its exact length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How much of the machine one bundle may use.

    Args:
        max_waiting_requests: calls that wait before more are turned away.
        limits: of one batch.
        max_delay_seconds: that a batch may wait for company, where that pays.
        ageing_seconds: in the queue, after which a call counts as one priority more urgent.
        threads: ONNX Runtime threads, shared by all bundles of the process.
    """

    max_waiting_requests: int = 256
    limits: BatchLimits = field(default_factory=BatchLimits)
    max_delay_seconds: float = 0.005
    ageing_seconds: float = 10.0
    threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Urgency:
    """When a call came and how much of a hurry it is in; times are those of `EncodeLoop.clock`."""

    arrival: float
    deadline: float | None = None
    priority: int = 0
    tenant: str = ""


@dataclass(slots=True, eq=False)
class EncodeCall(Generic[Result]):
    """The items of one call, by what name they go in errors, and what becomes of each once `done` has come."""

    items: Sequence[Item]
    finish: Finish[Result]
    urgency: Urgency
    field_name: str
    done: asyncio.Future[None]
    found: list[Result | None] = field(init=False)
    missing: int = field(init=False)
    started: float | None = None
    ended: float = 0.0
    waiting: "Waiting[EncodeCall[Any]]" = field(init=False)

    def __post_init__(self) -> None:
        self.found = [None] * len(self.items)
        self.missing = len(self.items)
        self.waiting = Waiting(
            owner=self,
            lengths=[item.length for item in self.items],
            arrival=self.urgency.arrival,
            deadline=self.urgency.deadline,
            priority=self.urgency.priority,
            tenant=self.urgency.tenant,
        )

    @property
    def arrival(self) -> float:
        """When it came."""
        return self.urgency.arrival

    @property
    def results(self) -> list[Result]:
        """What became of each item, in their order."""
        assert not self.missing, "the call is finished"
        return cast(list[Result], self.found)


@dataclass(frozen=True, slots=True)
class _Job:
    call: EncodeCall[Any]
    index: int

    @property
    def item(self) -> Item:
        return self.call.items[self.index]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of one item, or the reason why nothing did."""

    job: _Job
    result: Any
    reason: str = ""


class EncodeLoop(BundleThread):
    """Serves one loaded encoder. `load` builds it anywhere; everything else belongs to the event loop."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        graph: EncodeGraph,
        probe: Probe,
        options: EncodeOptions,
        metrics: ModelMetrics,
        checks: Sequence[Check] = (),
        latency: LatencyModel | None = None,
    ) -> None:
        super().__init__("encoder", manifest, checks, latency)
        self._graph = graph
        self._probe = probe
        self._options = options
        self._metrics = metrics
        self._calls: set[EncodeCall[Any]] = set()
        self._queue: EncodeQueue[EncodeCall[Any]] = EncodeQueue(options.limits, options.ageing_seconds)
        self._arrivals = Arrivals()
        self._free_at = 0.0  # as predicted, when the running batch has ended
        self._backlog = (0, 0.0)  # tokens that wait, and the seconds that they take at least
        self._changed = threading.Condition()
        self._stopped = False

    @classmethod
    def load(cls, found: FoundBundle, options: EncodeOptions, metrics: ModelMetrics) -> Self:
        """Verify a bundle, load its graph, and run every load-time check. Blocks for seconds.

        Raises:
            BundleRefused: a check failed; the message says which and by how much.
        """
        verify_files(found)
        use_threads(options.threads)
        graph = EncodeGraph(found)
        latency = LatencyModel()
        graph.observer = latency.observe
        checks = check_encoder(found, graph)
        graph.observer = None
        return cls(
            manifest=found.manifest,
            graph=graph,
            probe=encoder_probe(found, graph),
            options=options,
            metrics=metrics,
            checks=checks,
            latency=latency,
        )

    @property
    def capacity(self) -> int:
        """Most tokens of a text."""
        return self.manifest.limits.max_model_len

    # Called on the event loop

    def submit(
        self, items: Sequence[Item], finish: Finish[Result], urgency: Urgency, field_name: str = "inputs"
    ) -> EncodeCall[Result]:
        """Queue items, none empty or longer than the capacity; `result` waits for them.

        Raises:
            QueueFull: as many calls wait as may.
            DeadlineUnreachable: as predicted, they would not be finished in time.
            Draining: no more calls are taken.
            ModelUnavailable: the thread has failed.
        """
        self._check_accepts()
        limit = self._options.max_waiting_requests
        if len(self._calls) >= limit:
            raise QueueFull(
                f"{len(self._calls)} requests run or wait, the limit is {limit}",
                0.1,
                {"requests": str(len(self._calls)), "max_requests": str(limit)},
            )
        assert all(0 < item.length <= self.capacity for item in items), "lengths are checked by the caller"
        call = EncodeCall(items, finish, urgency, field_name, asyncio.get_running_loop().create_future())
        with self._changed:
            now = self.clock()
            seconds = self._seconds_to_finish(call, now)
            if urgency.deadline is not None and now + seconds > urgency.deadline:
                raise self._unreachable(call, now + seconds)
            self._queue.add(call.waiting)
            self._arrivals.note(now)
            self._changed.notify()
        self._calls.add(call)
        self._idle.clear()
        self._publish_queue()
        return call

    async def result(self, call: EncodeCall[Result]) -> EncodeCall[Result]:
        """Wait for a call that was submitted, and return it finished.

        One that is cancelled meanwhile leaves the queue; what is in a batch already is thrown away.

        Raises:
            DeadlineExceeded: its time is over.
            DeadlineUnreachable: it waited until it could not be finished in time.
            ExecutionFailed: the graph failed on one of the items, which is named after `field_name`.
            ModelUnavailable, Draining: the thread has ended.
        """
        deadline = call.urgency.deadline
        try:
            async with asyncio.timeout(None if deadline is None else deadline - self.clock()):
                await call.done
        except TimeoutError:
            phase = "waiting" if call.started is None else "encode"
            raise DeadlineExceeded(seconds=self.clock() - call.arrival, phase=phase, tokens=0) from None
        finally:
            self._forget(call)
        return call

    def _forget(self, call: EncodeCall[Any]) -> None:
        with self._changed:
            self._queue.remove(call.waiting)
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()
        self._publish_queue()

    def _cost(self) -> BatchCost | None:
        """Return what batches cost, if what was learned deserves trust."""
        if not self.latency.is_trusted("encode"):
            return None
        coefficients = self.latency.coefficients("encode", self.num_active)
        return None if coefficients is None else BatchCost(*coefficients)

    def _seconds_to_finish(self, call: EncodeCall[Any], now: float) -> float:
        """Return how long a new call will take, as predicted; 0 if nothing is known, or if it is alone: it may try."""
        cost = self._cost()
        if cost is None or call.urgency.deadline is None or not self._calls:
            return 0.0
        return max(0.0, self._free_at - now) + self._queue.seconds_to_finish(call.waiting, now, cost)

    def _unreachable(self, call: EncodeCall[Any], finished: float) -> DeadlineUnreachable:
        assert call.urgency.deadline is not None, "without a deadline it has all the time there is"
        running = sum(other.started is not None for other in self._calls)
        return DeadlineUnreachable(
            predicted_seconds=finished - call.arrival,
            budget_seconds=call.urgency.deadline - call.arrival,
            num_waiting=len(self._calls) - running,
            num_running=running,
        )

    def _drop(self, calls: Sequence[EncodeCall[Any]], cost: BatchCost) -> None:
        """End calls that have become hopeless; runs on the event loop."""
        for call in calls:
            if not call.done.done():
                call.done.set_exception(self._unreachable(call, self.clock() + call.waiting.seconds_left(cost)))

    def _publish(self, outcomes: Sequence[_Outcome], started: float, ended: float, padded_tokens: int) -> None:
        """Hand the results of a batch to their calls and to the metrics; runs on the event loop."""
        real = sum(outcome.job.item.length for outcome in outcomes)
        self._metrics.step("encode", len(outcomes), real, padded_tokens - real, ended - started)
        if not any(outcome.reason for outcome in outcomes):  # otherwise it was run more than once
            work = encode_work(len(outcomes), padded_tokens // len(outcomes))
            self.latency.observe("encode", work, ended - started, self.num_active)
        for outcome in outcomes:
            job, call = outcome.job, outcome.job.call
            if call.done.done():
                continue
            if call.started is None:
                call.started = started
                self._metrics.queued(job.item.length, started - call.arrival)
            if outcome.reason:
                call.done.set_exception(ExecutionFailed(f"{call.field_name}[{job.index}]: {outcome.reason}"))
                continue
            call.found[job.index] = outcome.result
            call.missing -= 1
            if not call.missing:
                call.ended = ended
                call.done.set_result(None)

    def _publish_queue(self) -> None:
        running = sum(call.started is not None for call in self._calls)
        self._metrics.queue(len(self._calls) - running, running, *self._backlog)

    def _end_all(self, error: AttendantError) -> None:
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(error)

    def _discard(self) -> None:
        del self._graph, self._probe
        self._metrics.queue(0, 0)

    # The encoder's thread

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._run_batch(batch)

    def _next_batch(self) -> list[_Job] | None:
        """Wait for items and take those that run together; None means stop."""
        self._busy_since = None
        with self._changed:
            began = None
            while not self._stopped:
                now, cost = self.clock(), self._cost()
                if cost is not None and (hopeless := self._queue.drop_hopeless(now, cost)):
                    self._call_soon(self._drop, [waiting.owner for waiting in hopeless], cost)
                if not self._queue.num_waiting:
                    began = None
                    self._changed.wait()
                    continue
                began = now if began is None else began
                delay = 0.0 if cost is None else self._delay(cost, now, began)
                if delay <= 0:
                    batch = self._queue.next_batch(now, cost)
                    return [_Job(waiting.owner, index) for waiting, index in batch]
                self._changed.wait(delay)
        return None

    def _delay(self, cost: BatchCost, now: float, began: float) -> float:
        """Return how long to wait for company: only while all that waits is one batch, and no deadline suffers."""
        limit = began + self._options.max_delay_seconds - now
        lengths = self._queue.waiting_lengths()
        rows, longest = len(lengths), max(lengths)
        if limit <= 0 or rows >= self._options.limits.rows(longest):
            return 0.0
        slack = self._queue.first_due - now - 2 * cost.of_batch(rows + 1, longest)
        company = Company(rows=rows, run=cost.run, row=cost.of_row(longest))
        return best_delay(company, self._arrivals.next_gaps(now), min(limit, slack))

    def _run_batch(self, batch: list[_Job]) -> None:
        started = self._busy_since = self.clock()
        longest = max(job.item.length for job in batch)
        cost = self._cost()
        self._free_at = started + (0.0 if cost is None else cost.of_batch(len(batch), longest))
        with self._changed:
            self._backlog = self._queue.backlog(cost)
        outcomes = self._encode(batch)
        if all(outcome.reason for outcome in outcomes):
            self._probe.check()
        ended = self.clock()
        with self._changed:
            self._queue.charge([(job.call.waiting, job.index) for job in batch], ended - started)
        self._call_soon(self._publish, outcomes, started, ended, len(batch) * longest)

    def _encode(self, batch: list[_Job]) -> list[_Outcome]:
        """Run a batch; if that fails, run its items one by one, which gives the same bits, to find the one at fault."""
        try:
            found = self._graph.run([job.item for job in batch])
            return [_outcome(job, array) for job, array in zip(batch, found, strict=True)]
        except Exception as error:
            logger.exception("a batch of %d items failed", len(batch))
            if len(batch) == 1:
                return [_Outcome(batch[0], None, f"it could not be run ({type(error).__name__})")]
            return [outcome for job in batch for outcome in self._encode([job])]


def _outcome(job: _Job, array: Array) -> _Outcome:
    if not np.isfinite(array).all():
        return _Outcome(job, None, "what the model made of it is not finite")
    return _Outcome(job, job.call.finish(array))
