"""One encoder's thread, and the calls through which the event loop talks to it.

As in `engine_loop`, the event loop submits and the thread works: it takes whatever texts wait, forms a batch of similar
lengths, runs it, and hands all vectors of the batch back in one `call_soon_threadsafe`. Texts of one call may run in
different batches; the call ends with its last text.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Check, Manifest
from service.bundle import FoundBundle, verify_files
from service.bundle_thread import BundleThread
from service.engine.encode_graph import EncodeGraph
from service.engine.encode_self_test import check_encoder
from service.engine.pooling import VectorOptions, pool
from service.engine.runtime import use_threads
from service.errors import AttendantError, ExecutionFailed, QueueFull
from service.metrics import ModelMetrics
from service.scheduling.batching import BatchLimits, form_batch

logger = logging.getLogger(__name__)

_CANDIDATES = 1024  # of the waiting texts, oldest first: enough for any length to find its like


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
class EncodeCall:
    """The texts of one call. `vectors` are complete once `done` has come; times are those of `EncodeLoop.clock`."""

    texts: Sequence[Sequence[int]]
    options: VectorOptions
    arrival: float
    done: asyncio.Future[None]
    vectors: list[NDArray[np.float32] | None] = field(init=False)
    missing: int = field(init=False)
    started: float | None = None
    ended: float = 0.0
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.vectors = [None] * len(self.texts)
        self.missing = len(self.texts)


@dataclass(frozen=True, slots=True)
class _Text:
    call: EncodeCall
    index: int

    @property
    def token_ids(self) -> Sequence[int]:
        return self.call.texts[self.index]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of one text: a vector, or the reason why there is none."""

    text: _Text
    vector: NDArray[np.float32] | None
    reason: str = ""


class EncodeLoop(BundleThread):
    """Serves one loaded encoder. `load` builds it anywhere; everything else belongs to the event loop."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        graph: EncodeGraph,
        options: EncodeOptions,
        metrics: ModelMetrics,
        checks: Sequence[Check] = (),
    ) -> None:
        super().__init__("encoder", manifest, checks)
        self._graph = graph
        self._options = options
        self._metrics = metrics
        self._calls: set[EncodeCall] = set()
        self._waiting: deque[_Text] = deque()
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
        checks = check_encoder(found, graph)
        return cls(manifest=found.manifest, graph=graph, options=options, metrics=metrics, checks=checks)

    @property
    def capacity(self) -> int:
        """Most tokens of a text."""
        return self.manifest.limits.max_model_len

    # Called on the event loop

    async def encode(self, texts: Sequence[Sequence[int]], options: VectorOptions, arrival: float) -> EncodeCall:
        """Encode texts of token ids, none empty or longer than the capacity, and return the finished call.

        A call that is cancelled meanwhile leaves the queue; what is in a batch already is thrown away.

        Raises:
            QueueFull: as many calls wait as may.
            Draining: no more calls are taken.
            ModelUnavailable: the thread has failed.
            ExecutionFailed: the graph failed on one of the texts.
        """
        call = self._submit(texts, options, arrival)
        try:
            await call.done
        finally:
            call.cancelled = True
            self._forget(call)
        return call

    def _submit(self, texts: Sequence[Sequence[int]], options: VectorOptions, arrival: float) -> EncodeCall:
        self._check_accepts()
        limit = self._options.max_waiting_requests
        if len(self._calls) >= limit:
            raise QueueFull(
                f"{len(self._calls)} requests run or wait, the limit is {limit}",
                0.1,
                {"requests": str(len(self._calls)), "max_requests": str(limit)},
            )
        assert all(0 < len(text) <= self.capacity for text in texts), "lengths are checked by the caller"
        call = EncodeCall(texts, options, arrival, asyncio.get_running_loop().create_future())
        self._calls.add(call)
        self._idle.clear()
        with self._changed:
            self._waiting.extend(_Text(call, index) for index in range(len(texts)))
            self._changed.notify()
        self._publish_occupancy()
        return call

    def _forget(self, call: EncodeCall) -> None:
        self._calls.discard(call)
        if not self._calls:
            self._idle.set()
        self._publish_occupancy()

    def _publish(self, outcomes: Sequence[_Outcome], started: float, ended: float, padded_tokens: int) -> None:
        """Hand a batch's vectors to their calls and to the metrics; runs on the event loop."""
        real = sum(len(outcome.text.token_ids) for outcome in outcomes)
        self._metrics.step("encode", len(outcomes), real, padded_tokens - real, ended - started)
        for outcome in outcomes:
            call = outcome.text.call
            if call.done.done():
                continue
            if call.started is None:
                call.started = started
                self._metrics.queued(len(outcome.text.token_ids), started - call.arrival)
            if outcome.vector is None:
                call.done.set_exception(ExecutionFailed(f"inputs[{outcome.text.index}]: {outcome.reason}"))
                continue
            call.vectors[outcome.text.index] = outcome.vector
            call.missing -= 1
            if not call.missing:
                call.ended = ended
                call.done.set_result(None)

    def _publish_occupancy(self) -> None:
        running = sum(call.started is not None for call in self._calls)
        self._metrics.occupancy(len(self._calls) - running, running, 0, 0)

    def _end_all(self, error: AttendantError) -> None:
        for call in self._calls:
            if not call.done.done():
                call.done.set_exception(error)

    # The encoder's thread

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            if batch:
                self._run_batch(batch)

    def _next_batch(self) -> list[_Text] | None:
        """Wait for texts and take those that run together; None means stop."""
        self._busy_since = None
        with self._changed:
            while not self._waiting and not self._stopped:
                self._changed.wait()
            if self._stopped:
                return None
            live = [text for text in self._waiting if not text.call.cancelled]
            lengths = [len(text.token_ids) for text in live[:_CANDIDATES]]
            chosen = set(form_batch(lengths, self._options.limits)) if live else set()
            self._waiting = deque(text for index, text in enumerate(live) if index not in chosen)
        return [text for index, text in enumerate(live) if index in chosen]

    def _run_batch(self, batch: list[_Text]) -> None:
        started = self._busy_since = self.clock()
        outcomes = self._encode(batch)
        padded = len(batch) * max(len(text.token_ids) for text in batch)
        self._call_soon(self._publish, outcomes, started, self.clock(), padded)

    def _encode(self, batch: list[_Text]) -> list[_Outcome]:
        """Run a batch; if that fails, run its texts one by one, which gives the same bits, to find the one at fault."""
        try:
            found = self._graph.run([text.token_ids for text in batch])
        except Exception as error:
            logger.exception("a batch of %d texts failed", len(batch))
            if len(batch) == 1:
                return [_Outcome(batch[0], None, f"the graph failed ({type(error).__name__})")]
            return [outcome for text in batch for outcome in self._encode([text])]
        return [_outcome(text, vectors) for text, vectors in zip(batch, found, strict=True)]


def _outcome(text: _Text, vectors: NDArray[np.float32]) -> _Outcome:
    vector = pool(vectors, text.call.options)
    if not np.isfinite(vector).all():
        return _Outcome(text, None, "its vector is not finite")
    return _Outcome(text, vector)
