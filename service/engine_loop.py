"""One bundle's engine thread, and how the event loop talks to it.

The event loop submits and cancels; the engine thread owns the scheduler and the engine and runs step after step of
their pipeline; all that a step produced crosses back in one `call_soon_threadsafe`. Neither side waits for the other: a
stream nobody reads costs its answer's tokens in memory, bounded by max_tokens, and nothing else.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from attendant.bundle import Check, Manifest
from service.bundle import FoundBundle, verify_files
from service.bundle_thread import BundleThread
from service.engine.assembly import assemble
from service.engine.device import Device
from service.engine.engine import Engine
from service.engine.probe import generation_probe
from service.engine.runtime import use_threads
from service.engine.self_test import check_bundle
from service.errors import (
    AttendantError,
    ContextLengthExceeded,
    DeadlineExceeded,
    DeadlineUnreachable,
    ExecutionFailed,
    QueueFull,
)
from service.metrics import ModelMetrics
from service.pipeline import Pipeline, Step
from service.scheduling.canary import Canary, Verdict
from service.scheduling.config import SchedulerConfig
from service.scheduling.latency import LatencyModel
from service.scheduling.plan import (
    Event,
    ExpiryEvent,
    FailureEvent,
    RefusalEvent,
    Release,
    SearchEvent,
    StepPlan,
    StepResult,
    TokenEvent,
)
from service.scheduling.request import Request
from service.scheduling.scheduler import Scheduler
from service.scheduling.sequence import Occupancy, Snapshot
from service.scheduling.slots import PAGE_POSITIONS
from service.scheduling.work import Phase, Work, plan_work
from service.token_stream import TokenStream

_FORECAST_SECONDS = 0.25  # between two looks at how long the queue is: it costs more than a scrape can show

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How much of the machine one bundle may use.

    Args:
        num_slots: sequences that run at once.
        max_waiting_requests: requests that wait for a slot before more are turned away.
        kv_memory: bytes for the states of all sequences; on a GPU, what its free memory allows if None.
        num_bundles: bundles that share what is free then.
        cuda_graphs: whether a GPU's decode runs are captured and replayed.
        prefill_chunk_tokens: longest prefill chunk while other sequences decode.
        idle_chunk_tokens: longest prefill chunk while nothing decodes.
        inter_token_target_seconds: between two tokens of a stream; it sizes the prefill chunks beside it, if not 0.
        ageing_seconds: in the queue, after which a request counts as one priority more urgent.
        canary_rate: share of the greedy requests that are computed again, alone, when nothing else is to be done.
        idle_release_seconds: time without work before the memory of free slots is given back.
        threads: ONNX Runtime threads, shared by all bundles of the process.
    """

    num_slots: int = 32
    max_waiting_requests: int = 256
    kv_memory: int | None = 4 << 30
    num_bundles: int = 1
    cuda_graphs: bool = True
    prefill_chunk_tokens: int = 256
    idle_chunk_tokens: int = 512
    inter_token_target_seconds: float = 0.1
    ageing_seconds: float = 10.0
    canary_rate: float = 0.0
    idle_release_seconds: float = 300.0
    threads: int = 2


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


class _Stop:
    pass


_Command = Request | _Cancel | _Stop


class EngineLoop(BundleThread):
    """Serves one loaded bundle. `load` builds it anywhere; everything else belongs to the event loop."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        engine: Engine,
        config: SchedulerConfig,
        options: EngineOptions,
        metrics: ModelMetrics,
        checks: Sequence[Check] = (),
        latency: LatencyModel | None = None,
        load_seconds: float = 0.0,
    ) -> None:
        super().__init__("engine", manifest, checks, latency)
        self.load_seconds = load_seconds
        self._engine = engine
        self._scheduler = Scheduler(config, self._predict)
        self._pipeline = Pipeline(self._scheduler, engine, self.clock)
        self._options = options
        self._metrics = metrics
        metrics.memory_is(config.kv_budget, PAGE_POSITIONS, config.num_slots)
        self._queue_seconds = 0.0  # as foreseen when `_forecast_at` was last put off
        self._forecast_at = 0.0
        # Only the CPU's kernels give the same bits in any batch.
        self._canary = Canary(options.canary_rate if manifest.target == "cpu" else 0.0, self._judge)
        self._has_differed = False
        self._streams: dict[str, TokenStream] = {}
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._last_finishes: deque[float] = deque(maxlen=16)
        # Of the last step: handed to the event loop while a device computes the next, so that they do not compete.
        self._unpublished: Step | None = None

    @classmethod
    def load(
        cls, found: FoundBundle, options: EngineOptions, metrics: ModelMetrics, device: Device | None = None
    ) -> Self:
        """Verify a bundle, load its graph, and run every load-time check. Blocks for seconds.

        Args:
            found: the bundle.
            options: how much of the machine it may use.
            metrics: what is told of it.
            device: what runs it; if None, the processor or the GPU, as the bundle says.

        Raises:
            BundleRefused: a check failed; the message says which and by how much.
            ValueError: `kv_memory` is too small for this bundle.
        """
        started = time.perf_counter()
        verify_files(found)
        use_threads(options.threads)
        assembly = assemble(
            found,
            max_slots=options.num_slots,
            kv_memory=options.kv_memory,
            num_bundles=options.num_bundles,
            device=device,
            captures=options.cuda_graphs,
        )
        graph = assembly.checked
        latency = LatencyModel()
        graph.observer = latency.observe
        checks = (*assembly.checks, *check_bundle(found, graph))
        graph.observer = None
        probe = generation_probe(found, graph)
        config = SchedulerConfig(
            num_slots=assembly.num_slots,
            capacity=assembly.size.capacity,
            kv_budget=assembly.size.budget,
            chunk_tokens=options.prefill_chunk_tokens,
            idle_chunk_tokens=options.idle_chunk_tokens,
            inter_token_target=options.inter_token_target_seconds,
            ageing=options.ageing_seconds,
            prefill_chunk=found.manifest.limits.prefill_chunk,
            window=assembly.size.window,
            reuses_prefixes=graph.rewinds and graph.prefill_chunk is None,
            joins_prompts=graph.joins_prompts,
            row_buckets=assembly.row_buckets,
        )
        return cls(
            manifest=found.manifest,
            engine=Engine(assembly.graph, assembly.chooser, probe),
            config=config,
            options=options,
            metrics=metrics,
            checks=checks,
            latency=latency,
            load_seconds=time.perf_counter() - started,
        )

    @property
    def capacity(self) -> int:
        """Most tokens of prompt and answer together: the model's limit, or less where KV memory is short."""
        return self._scheduler.config.capacity

    @property
    def capacity_name(self) -> str:
        """What sets `capacity`: "max_model_len" or "kv_memory"."""
        return "max_model_len" if self.capacity == self.manifest.limits.max_model_len else "kv_memory"

    @property
    def num_slots(self) -> int:
        """Sequences that run at once, and so the widest beam search."""
        return self._scheduler.config.num_slots

    def snapshot(self) -> Snapshot:
        """Return the scheduler's state as it is between two steps (or nearly: it is read from outside)."""
        return self._scheduler.snapshot()

    # Called on the event loop

    def submit(self, request: Request) -> TokenStream:
        """Queue a request and return its stream.

        Raises:
            ContextLengthExceeded: it can never fit.
            QueueFull: as many requests wait as may.
            Draining: no more requests are taken.
            ModelUnavailable: the engine has failed.
        """
        self._check_accepts()
        if not self._scheduler.fits(request):
            limit = min(self.capacity, self._scheduler.config.kv_budget // request.num_slots)
            raise ContextLengthExceeded(
                prompt_tokens=len(request.prompt),
                max_tokens=request.max_tokens,
                limit=limit,
                limit_name=self.capacity_name if limit == self.capacity else "kv_memory",
            )
        limit = self.num_slots + self._options.max_waiting_requests
        if len(self._streams) >= limit:
            raise QueueFull(
                f"{len(self._streams)} requests run or wait, the limit is {limit}",
                self._retry_after(),
                {"requests": str(len(self._streams)), "max_requests": str(limit)},
            )
        assert request.request_id not in self._streams, f"request {request.request_id} is already here"
        stream = self._streams[request.request_id] = TokenStream(request, self._forget)
        self._idle.clear()
        self._stop_replay()
        self._canary.admit(request)
        self._commands.put(request)
        return stream

    def tick(self) -> None:
        """Replay a finished request if one is due and no bundle has anything to do; called about once a second."""
        now = self.clock()
        self._canary.expire(now)
        if self._streams or not self._accepts or self._failure or self.num_active > 1:
            return
        replay = self._canary.next_replay(now)
        if replay is not None:
            self._commands.put(replay)

    def _stop_replay(self) -> None:
        """Give the processor back to those who wait for an answer; the replay is tried again later."""
        replay_id = self._canary.interrupt()
        if replay_id is not None:
            self._commands.put(_Cancel(replay_id))

    def _judge(self, verdict: Verdict) -> None:
        self._metrics.replayed(verdict.result)
        if verdict.result == "different" and not self._has_differed:
            self._has_differed = True
            logger.error(
                "%s answers otherwise alone than it did among others: request %s, from token %s of the answer on; "
                "further ones are counted only",
                self.manifest.key,
                verdict.request_id,
                verdict.position,
            )

    def _forget(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._canary.lose(request_id)
            self._commands.put(_Cancel(request_id))
            self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams:
            self._idle.set()

    def _retry_after(self) -> float:
        """Guess when a place comes free, from how fast requests have been finishing."""
        finishes = self._last_finishes
        if len(finishes) < 2:
            return 1.0
        pace = (finishes[-1] - finishes[0]) / (len(finishes) - 1)
        return min(max(pace, 0.05), 30.0)

    def _publish(self, plan: StepPlan, result: StepResult, events: list[Event], occupancy: Occupancy) -> None:
        """Hand a step's events to their streams and to the metrics; runs on the event loop."""
        now = self.clock()
        events = [event for event in events if not self._canary.hear(event, now)]
        if self.num_active > 1:
            self._stop_replay()
        for event in events:
            stream = self._streams.get(event.request.request_id)
            if isinstance(event, FailureEvent | ExpiryEvent | RefusalEvent):
                if stream is not None:
                    del self._streams[event.request.request_id]
                    stream.fail(self._error(event))
                continue
            self._observe(event)
            if stream is not None:
                if event.finish is not None:
                    del self._streams[event.request.request_id]
                    self._last_finishes.append(self.clock())
                stream.deliver(event)
        self._metrics.generated(sum(map(_num_tokens, events)))
        self._measure(plan, result)
        self._publish_occupancy(occupancy)
        self._note_idle()

    def _error(self, event: FailureEvent | ExpiryEvent | RefusalEvent) -> AttendantError:
        if isinstance(event, FailureEvent):
            return ExecutionFailed(event.message)
        if isinstance(event, RefusalEvent):
            assert event.request.deadline is not None, "nothing is refused that could take any time"
            return DeadlineUnreachable(
                predicted_seconds=event.predicted_seconds,
                budget_seconds=event.request.deadline - event.request.arrival,
                num_waiting=event.num_waiting,
                num_running=event.num_running,
            )
        seconds = self.clock() - event.request.arrival
        return DeadlineExceeded(seconds=seconds, phase=event.phase, tokens=event.num_tokens)

    def _publish_occupancy(self, now: Occupancy) -> None:
        predicted = self._queue_seconds if now.num_waiting else 0.0
        self._metrics.queue(now.num_waiting, now.num_running, now.num_uncomputed, predicted)
        self._metrics.memory(now.reserved, now.committed)

    def _measure(self, plan: StepPlan, result: StepResult) -> None:
        if plan.encodes:
            num_tokens = sum(len(encode.source.token_ids) for encode in plan.encodes)
            padded = len(plan.encodes) * max(len(encode.source.token_ids) for encode in plan.encodes)
            self._metrics.step("encode", len(plan.encodes), num_tokens, padded - num_tokens, result.encode_seconds)
        if plan.rows:
            real = sum(row.request_id is not None for row in plan.rows)
            self._metrics.step("decode", real, real, len(plan.rows) - real, result.decode_seconds)
        if plan.reads:
            num_tokens = sum(len(chunk.token_ids) for chunk in plan.reads)
            self._metrics.step("prefill", len(plan.reads), num_tokens, plan.prompt_padding, result.prefill_seconds)
        self._metrics.evicted(sum(isinstance(each, Release) for each in plan.memory))
        if not result.failures:  # what fails is run more than once
            self._learn(plan, result)

    def _learn(self, plan: StepPlan, result: StepResult) -> None:
        seconds: dict[Phase, float] = {
            "encode": result.encode_seconds,
            "prefill": result.prefill_seconds,
            "decode": result.decode_seconds,
        }
        active = self.num_active
        for phase, work in plan_work(plan).items():
            self.latency.observe(phase, work, seconds[phase], active)

    def _predict(self, phase: Phase, work: Work) -> float | None:
        """Foresee the seconds of a run, if what was learned deserves it; called on the engine thread."""
        return self.latency.predict(phase, work, self.num_active) if self.latency.is_trusted(phase) else None

    def _observe(self, event: TokenEvent | SearchEvent) -> None:
        metrics, num_prompt = self._metrics, event.request.num_prompt
        name = event.request.request_id.partition("/")[2]  # what its client calls it
        if isinstance(event, TokenEvent) and not event.is_first:
            metrics.inter_token(event.context_tokens, event.gap_seconds, name)
            return
        # Nothing of a search can be read before all of it is known.
        waited = event.gap_seconds if isinstance(event, TokenEvent) else self.clock() - event.request.arrival
        metrics.queued(num_prompt, event.queue_seconds, name)
        metrics.prefilled(num_prompt, event.prefill_seconds, event.cached_tokens, name)
        metrics.first_token(num_prompt, waited, name)

    def _end_all(self, error: AttendantError) -> None:
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        self._note_idle()

    def _discard(self) -> None:
        del self._engine, self._pipeline
        self._metrics.queue(0, 0)
        self._metrics.memory(0, 0)

    # The engine thread

    def _stop(self) -> None:
        self._commands.put(_Stop())

    def _work(self) -> None:
        self._engine.prepare()
        while self._take_commands():
            if self._pipeline.has_work:
                self._step()

    def _take_commands(self) -> bool:
        """Apply every command that has come; wait for one if there is nothing else to do. False means stop."""
        self._busy_since = None
        try:
            while True:
                if not self._pipeline.has_work:
                    self._hand_over()
                command = self._commands.get(
                    timeout=self._options.idle_release_seconds, block=not self._pipeline.has_work
                )
                if isinstance(command, Request):
                    self._scheduler.add(command)
                elif isinstance(command, _Cancel):
                    if self._scheduler.cancel(command.request_id):
                        self._hand_over()
                        # Nothing may follow that would say so.
                        self._call_soon(self._publish_occupancy, self._scheduler.occupancy())
                else:
                    self._hand_over()
                    return False
        except queue.Empty:
            if not self._pipeline.has_work:
                self._engine.execute(self._scheduler.release_idle())
        return True

    def _step(self) -> None:
        self._busy_since = self.clock()
        step = self._pipeline.step(self._hand_over)
        self._hand_over()
        now = self.clock()
        if now >= self._forecast_at:
            self._queue_seconds, self._forecast_at = self._scheduler.queue_seconds(now), now + _FORECAST_SECONDS
        self._unpublished = step
        if not self._engine.waits:
            self._hand_over()

    def _hand_over(self) -> None:
        """Hand what came of the last step to the event loop, unless that is done."""
        if self._unpublished is not None:
            self._call_soon(self._publish, *self._unpublished, self._scheduler.occupancy())
            self._unpublished = None


def _num_tokens(event: Event) -> int:
    """Return how many tokens of answers an event brings."""
    if isinstance(event, SearchEvent):
        return sum(len(found.token_ids) for found in event.finish.hypotheses)
    return int(isinstance(event, TokenEvent))
