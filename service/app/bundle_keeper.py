"""One bundle from its first load to the server's end: served, and loaded again whenever its engine has failed.

A bundle that is not fit to be served at its first load is refused for good. One that was served and then fails gets
more tries, because it was fit: its thread ends, its requests are told so, its session and its memory are dropped, and
it goes through every check of a load again. Other bundles notice nothing but the processor time that this takes.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from attendant.bundle import BundleError
from service.app.backoff import Backoff
from service.app.device_certificate import CertificateStore
from service.app.latency_store import LatencyStore
from service.app.loading import entry_of
from service.bundle import BundleRefused, FoundBundle
from service.bundle_thread import BundleThread
from service.metrics import ServerMetrics
from service.rpc.catalog import ModelCatalog, ServedModel, State

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the bundles of a server share.

    Args:
        catalog: where callers find them.
        metrics: where restarts are counted.
        threads: of those that are served.
        store: keeps what was learned of latency, if there is a place for it.
        certificates: keeps what was measured at the first load on this device, if there is a place for it.
        announce: told in one line what came of each.
        refresh: works out every health status anew.
    """

    catalog: ModelCatalog
    metrics: ServerMetrics
    threads: list[BundleThread]
    store: LatencyStore | None
    certificates: CertificateStore | None = None
    announce: Callable[[str], None]
    refresh: Callable[[], None]


class BundleKeeper:
    """Opens one bundle, then keeps it served; all on the event loop.

    Args:
        bundle: of the repository.
        load: verifies and loads it; blocks for seconds.
        stage: where it is served.
        backoff: how often it is loaded again.
    """

    def __init__(self, bundle: FoundBundle, load: Callable[[], ServedModel], stage: Stage, backoff: Backoff) -> None:
        self._bundle = bundle
        self._load = load
        self._stage = stage
        self._backoff = backoff
        self._load_seconds = 0.0
        self._learned: dict[str, object] = {}

    @property
    def _key(self) -> str:
        return self._bundle.manifest.key

    async def open(self) -> None:
        """Load the bundle and serve it, or list it with the reason why not."""
        reason = await self._try()
        if reason:
            self._take_down(State.UNAVAILABLE, reason)
            self._stage.announce(f"REFUSED {self._key}: {reason}")

    async def keep(self) -> None:
        """Load the bundle again whenever it fails; return once it is not served and never will be."""
        while (served := self._stage.catalog.find(self._key).served) is not None:
            failure = await served.loop.wait_failed()
            await self._restart(served, failure)

    async def _restart(self, failed: ServedModel, failure: str) -> None:
        self._learned = failed.loop.latency.to_dict()
        reason = f"it failed while it was served: {failure}"
        delay = self._backoff.next_delay(time.monotonic())
        self._wait_for(delay, reason)
        await failed.loop.close()
        while delay is not None:
            await asyncio.sleep(delay)
            refusal = await self._try()
            self._stage.metrics.restarted(self._key, succeeded=not refusal)
            if not refusal:
                gc.freeze()  # as after the first load
                return
            reason = f"it failed while it was served, and cannot be loaded again: {refusal}"
            delay = self._backoff.next_delay(time.monotonic())
            self._wait_for(delay, reason)

    def _wait_for(self, delay: float | None, reason: str) -> None:
        """Say that it is not served, and whether it may be again."""
        if delay is None:
            self._take_down(State.UNAVAILABLE, f"{reason}; {self._backoff.spent} tries to load it again are spent")
            self._stage.announce(f"FAILED {self._key}: {reason}")
            return
        again = f"try {self._backoff.spent} of {self._backoff.tries} to load it again in {delay:g} s"
        self._take_down(State.LOADING, f"{reason}; {again}", delay + self._load_seconds)
        self._stage.announce(f"RESTARTING {self._key}: {reason}; {again}")

    def _take_down(self, state: State, reason: str, retry_after_seconds: float | None = None) -> None:
        stage = self._stage
        stage.catalog.put(entry_of(self._bundle, state, reason, retry_after_seconds=retry_after_seconds))
        stage.metrics.refused_model(self._key)
        stage.refresh()

    async def _try(self) -> str:
        """Load the bundle and serve it; return why it cannot be, or nothing."""
        try:
            served = await asyncio.to_thread(self._load)
        except (BundleRefused, BundleError, ValueError) as error:
            return str(error)
        except Exception:
            logger.exception("loading %s failed", self._key)
            return "loading it failed unexpectedly; the server's log says more"
        stage, manifest, latency = self._stage, self._bundle.manifest, served.loop.latency
        if self._learned:
            latency.restore(self._learned)
        elif stage.store is not None:
            await asyncio.to_thread(stage.store.restore, self._bundle, latency)
        if stage.certificates is not None:
            certificate = await asyncio.to_thread(stage.certificates.certify, self._bundle, served.loop.checks)
            served = replace(served, certificate=certificate)
        served.loop.start(stage.threads)
        stage.catalog.put(entry_of(self._bundle, State.READY, served=served))
        served.metrics.latency(latency)
        served.metrics.loaded(
            served.load_seconds,
            sha256=self._bundle.sha256,
            family=manifest.family,
            precision=manifest.precision,
            target=manifest.target,
            timestamp=time.time(),
        )
        self._load_seconds = served.load_seconds
        self._backoff.came_up(time.monotonic())
        stage.refresh()
        stage.announce(f"READY {self._key} ({manifest.precision}) in {served.load_seconds:.2f} s")
        return ""
