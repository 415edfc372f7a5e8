"""The thread of one loaded bundle, from its start to its end; the loops over engines say what it does meanwhile.

`start`, `drain` and `close` belong to the event loop, `_work` runs on the thread and reaches the event loop by
`_call_soon` alone. A thread that has failed stays so: whoever wants the bundle served again loads it again.
"""

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from attendant.bundle import Check, Manifest
from service.engine.probe import EngineBroken
from service.errors import AttendantError, Draining, ModelUnavailable
from service.scheduling.latency import LatencyModel

logger = logging.getLogger(__name__)

_STUCK_SECONDS = 30.0
_RETRY_SECONDS = 1.0  # until it is known how long it takes to load the bundle again


class BundleThread(ABC):
    """What generation and encoding have in common.

    `latency` learns on the event loop what each run of a graph costs. A subclass sets `_busy_since` while it
    computes, and `_idle` while nobody waits for anything.

    Args:
        kind: names the thread.
        manifest: of the bundle.
        checks: what was checked at load.
        latency: has learned from these checks; a new one if None.
    """

    clock = staticmethod(time.perf_counter)

    def __init__(
        self, kind: str, manifest: Manifest, checks: Sequence[Check], latency: LatencyModel | None = None
    ) -> None:
        self.manifest = manifest
        self.checks = tuple(checks)
        self.latency = LatencyModel() if latency is None else latency
        self._kind = kind
        self._accepts = True
        self._failure = ""
        self._has_failed = asyncio.Event()
        self._busy_since: float | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._threads: list[BundleThread] = [self]

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Most tokens of a sequence."""

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and what it computes now has not taken half a minute."""
        since = self._busy_since
        stuck = since is not None and self.clock() - since > _STUCK_SECONDS
        return self._thread is not None and self._thread.is_alive() and not stuck and not self._failure

    @property
    def num_active(self) -> int:
        """Bundles of the process that compute now, this one always included."""
        return 1 + sum(thread is not self and thread._busy_since is not None for thread in self._threads)

    def start(self, threads: "list[BundleThread] | None" = None) -> None:
        """Start the thread; call it on the event loop that will submit.

        Args:
            threads: those of the process, among which this one takes its place until it is closed.
        """
        assert self._thread is None, "started twice"
        if threads is not None:
            threads.append(self)
            self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"{self._kind} {self.manifest.key}", daemon=True)
        self._thread.start()

    async def wait_failed(self) -> str:
        """Wait until the thread has failed and return why; by then every request has been told."""
        await self._has_failed.wait()
        return self._failure

    async def drain(self, deadline_seconds: float) -> bool:
        """Take no more requests and wait for those that are here; return whether all of them ended in time."""
        self._accepts = False
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop the thread after its current step and drop the graph; requests that are still here end as `Draining`."""
        self._accepts = False
        self._stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
            self._threads.remove(self)
        self._end_all(Draining("the server stopped before the request was finished"))
        self._discard()  # a call that a slow client holds up must not hold up the memory

    def _check_accepts(self) -> None:
        """Raise ModelUnavailable if the thread has failed or was never started, Draining if it is to end."""
        if self._failure or self._thread is None:
            raise self._unavailable()
        if not self._accepts:
            raise Draining("the server is stopping and takes no new requests")

    @abstractmethod
    def _stop(self) -> None:
        """Have `_work` return soon."""

    @abstractmethod
    def _end_all(self, error: AttendantError) -> None:
        """End every request that is here with an error; runs on the event loop."""

    @abstractmethod
    def _discard(self) -> None:
        """Drop the graph, which nobody runs any more, and the memory of its states."""

    @abstractmethod
    def _work(self) -> None:
        """Compute until `_stop`; runs on the thread."""

    def _run(self) -> None:
        try:
            self._work()
        except EngineBroken as error:
            self._fail(str(error))
        except Exception as error:
            logger.exception("the %s of %s stopped: a fault of ours", self._kind, self.manifest.key)
            self._fail(f"its thread stopped ({type(error).__name__})")
        finally:
            self._busy_since = None

    def _fail(self, reason: str) -> None:
        logger.error("%s has failed: %s", self.manifest.key, reason)
        self._failure = reason
        self._call_soon(self._tell_failure)

    def _tell_failure(self) -> None:
        self._end_all(self._unavailable())
        self._has_failed.set()

    def _unavailable(self) -> ModelUnavailable:
        key = self.manifest.key
        why = self._failure or "it was not started"
        return ModelUnavailable(f"model {key} has failed: {why}", {"model": key}, _RETRY_SECONDS)

    def _call_soon(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("the event loop is closed; what was computed has nobody to go to")
