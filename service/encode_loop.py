"""One encoder's thread, and the calls through which the event loop talks to it.

As in `engine_loop`, the event loop submits and the thread works: it takes whatever texts or images wait, forms a batch
of similar lengths, runs it, makes of each result what its task asks for, and hands all of the batch back in one
`call_soon_threadsafe`. Items of one call may run in different batches; the call ends with its last item.
"""

import asyncio
import logging
import threading
from collections import deque
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
from service.errors import AttendantError, ExecutionFailed, QueueFull
from service.metrics import ModelMetrics
from service.scheduling.batching import BatchLimits, form_batch
from service.scheduling.latency import LatencyModel
from service.scheduling.work import encode_work

logger = logging.getLogger(__name__)

_CANDIDATES = 1024  # of the waiting items, oldest first: enough for any length to find its like

Result = TypeVar("Result")
Finish = Callable[[Array], Result]
"""A task's own last step: makes an answer of what the graph made of one item, on its exact length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How much of the machine one bundle may use.

    Args:
        max_waiting_requests: calls that wait before more are turned away.
        limits: of one batch.
        threads: ONNX Runtime threads, shared by all bundles of the process.
    """

    max_waiting_requests: int = 256
    limits: BatchLimits = field(default_factory=BatchLimits)
    threads: int = 2


@dataclass(slots=True, eq=False)
class EncodeCall(Generic[Result]):
    """The items of one call, by what name they go in errors, and what becomes of each once `done` has come.

    Times are those of `EncodeLoop.clock`.
    """

    items: Sequence[Item]
    finish: Finish[Result]
    arrival: float
    field_name: str
    done: asyncio.Future[None]
    found: list[Result | None] = field(init=False)
    missing: int = field(init=False)
    started: float | None = None
    ended: float = 0.0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.found = [None] * len(self.items)
        self.missing = len(self.items)

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
        self._waiting: deque[_Job] = deque()
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

    async def encode(
        self, items: Sequence[Item], finish: Finish[Result], arrival: float, field_name: str = "inputs"
    ) -> EncodeCall[Result]:
        """Run items, none empty or longer than the capacity, and return the finished call.

        A call that is cancelled meanwhile leaves the queue; what is in a batch already is thrown away.

        Raises:
            QueueFull: as many calls wait as may.
            Draining: no more calls are taken.
            ModelUnavailable: the thread has failed.
            ExecutionFailed: the graph failed on one of the items, which is named after `field_name`.
        """
        future = asyncio.get_running_loop().create_future()
        call = EncodeCall(items, finish, arrival, field_name, future)
        self._submit(call)
        try:
            await call.done
        finally:
            call.cancelled = True
            self._forget(call)
        return call

    def _submit(self, call: EncodeCall[Any]) -> None:
        self._check_accepts()
        limit = self._options.max_waiting_requests
        if len(self._calls) >= limit:
            raise QueueFull(
                f"{len(self._calls)} requests run or wait, the limit is {limit}",
                0.1,
                {"requests": str(len(self._calls)), "max_requests": str(limit)},
            )
        assert all(0 < item.length <= self.capacity for item in call.items), "lengths are checked by the caller"
        self._calls.add(call)
        self._idle.clear()
        with self._changed:
            self._waiting.extend(_Job(call, index) for index in range(len(call.items)))
            self._changed.notify()
        self._publish_occupancy()

    def _forget(self, call: EncodeCall[Any]) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()
        self._publish_occupancy()

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

    def _publish_occupancy(self) -> None:
        running = sum(call.started is not None for call in self._calls)
        self._metrics.queue(len(self._calls) - running, running)

    def _end_all(self, error: AttendantError) -> None:
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(error)

    def _discard(self) -> None:
        del self._graph, self._probe

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
            while not self._waiting and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            live = [job for job in self._waiting if not job.call.cancelled]
            lengths = [job.item.length for job in live[:_CANDIDATES]]
            chosen = set(form_batch(lengths, self._options.limits)) if live else set()
            self._waiting = deque(job for index, job in enumerate(live) if index not in chosen)
        return [job for index, job in enumerate(live) if index in chosen]

    def _run_batch(self, batch: list[_Job]) -> None:
        started = self._busy_since = self.clock()
        outcomes = self._encode(batch)
        if all(outcome.reason for outcome in outcomes):
            self._probe.check()
        padded = len(batch) * max(job.item.length for job in batch)
        self._call_soon(self._publish, outcomes, started, self.clock(), padded)

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
