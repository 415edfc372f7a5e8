"""The composition root: settings become a running server, and a signal its orderly end.

The ports open first, so that a second server fails at once and probes have somebody to ask. Bundles are loaded one
after the other in a thread; each is served as soon as it has passed its checks, and one that has not is listed with the
reason.
"""

import asyncio
import contextlib
import gc
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import grpc
import onnxruntime
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from attendant.bundle import BundleError
from attendant.v1 import inference_service_pb2, model_service_pb2
from service.bundle import BundleRefused, FoundBundle, RefusedBundle, scan
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import MetricsEndpoint, ModelMetrics, ServerMetrics
from service.rpc.catalog import Entry, ModelCatalog, ServedModel, State
from service.rpc.health import HealthService
from service.rpc.inference import InferenceService
from service.rpc.models import ModelService
from service.rpc.readiness import INFERENCE_SERVICE, MODEL_SERVICE, health_of
from service.rpc.registration import handlers
from service.rpc.workers import TextWorkers
from service.settings import Settings
from service.text import TextCodec

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0
_LOOP_STUCK_SECONDS = 30.0
_LAST_WORDS_SECONDS = 2.0
_WATCHDOG_SECONDS = 15.0
_MAX_STREAMS_PER_CONNECTION = 1000


class StartError(Exception):
    """The server cannot start; the message says why."""


class App:
    """One server. `start`, then `wait_loaded`, then `stop`; all on one event loop.

    Args:
        settings: what to serve and how.
        announce: told in one line what came of each bundle.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], None] = logger.info) -> None:
        self._settings = settings
        self._announce = announce
        self.catalog = ModelCatalog()
        self.metrics = ServerMetrics(settings.seq_buckets)
        self.metrics.build_info.labels(version("attendant"), platform.python_version(), onnxruntime.__version__).set(1)
        self._health = HealthService()
        self._workers = TextWorkers(settings.text_threads, settings.max_waiting_requests)
        self._server = self._build_server()
        self._endpoint: MetricsEndpoint | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_loading = True
        self._is_draining = False
        self._last_beat = time.monotonic()
        self.port = 0

    @property
    def metrics_port(self) -> int:
        """TCP port of the metrics, once started."""
        assert self._endpoint is not None
        return self._endpoint.port

    # Start

    async def start(self) -> None:
        """Open both ports and begin to load.

        Raises:
            StartError: there is nothing to load, or a port is taken.
        """
        to_load = self._survey()
        self._open_ports()
        self._refresh()
        await self._server.start()
        self._announce(
            f"LISTENING {self._settings.host}: gRPC on port {self.port}, metrics on port {self.metrics_port}"
        )
        self._tasks = [asyncio.create_task(self._load_all(to_load)), asyncio.create_task(self._watch())]

    async def wait_loaded(self) -> None:
        """Wait until every bundle is served or refused.

        Raises:
            StartError: not one is served.
        """
        await asyncio.shield(self._tasks[0])
        if not self.catalog.served:
            raise StartError(f"no bundle of {self._settings.repository} can be served")

    def _survey(self) -> list[FoundBundle]:
        """Fill the catalog with what is chosen of the repository and return what can be tried."""
        try:
            found = scan(self._settings.repository)
        except NotADirectoryError as error:
            raise StartError(str(error)) from error
        chosen = _choose(found, self._settings.models)
        if not chosen:
            raise StartError(f"repository {self._settings.repository} holds no bundle")
        to_load = []
        for bundle in chosen:
            if isinstance(bundle, RefusedBundle):
                self._refuse(Entry(name=bundle.name, version=bundle.version, state=State.LOADING), bundle.reason)
            else:
                self.catalog.put(_entry(bundle, State.LOADING))
                to_load.append(bundle)
        return to_load

    def _build_server(self) -> grpc.aio.Server:
        settings = self._settings
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # or a second server would silently share the port
                ("grpc.max_receive_message_length", int(settings.max_message_bytes)),
                ("grpc.max_send_message_length", int(settings.max_message_bytes)),
                ("grpc.max_concurrent_streams", _MAX_STREAMS_PER_CONNECTION),
                ("grpc.keepalive_time_ms", int(settings.keepalive_seconds * 1000)),
                ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_seconds * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ]
        )
        inference = InferenceService(self.catalog, self._workers, self.metrics, settings.max_prompt_bytes)
        services: list[tuple[Any, object, Any]] = [
            (inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"], inference, inference.ended),
            (model_service_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(self.catalog), None),
            (health_pb2.DESCRIPTOR.services_by_name["Health"], self._health, None),
        ]
        server.add_generic_rpc_handlers([handlers(*service) for service in services])
        if settings.reflection:
            names = (INFERENCE_SERVICE, MODEL_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        return server

    def _open_ports(self) -> None:
        host, settings = self._settings.host, self._settings
        address = f"[{host}]" if ":" in host else host
        try:
            self.port = self._server.add_insecure_port(f"{address}:{settings.port}")
        except RuntimeError as error:
            raise StartError(
                f"cannot listen on {address}:{settings.port} (--port): is another server there? ({error})"
            ) from error
        try:
            self._endpoint = MetricsEndpoint(
                self.metrics.registry,
                host=host,
                port=settings.metrics_port,
                alive=self._is_alive,
                ready=lambda: self._health.is_healthy("readiness"),
            )
        except OSError as error:
            raise StartError(
                f"cannot listen on {address}:{settings.metrics_port} (--metrics-port): {error.strerror}"
            ) from error

    # Loading

    async def _load_all(self, bundles: Sequence[FoundBundle]) -> None:
        settings = self._settings
        options = EngineOptions(
            num_slots=settings.max_num_seqs,
            max_waiting_requests=settings.max_waiting_requests,
            kv_memory=settings.kv_memory // max(1, len(bundles)),
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            idle_chunk_tokens=settings.idle_chunk_tokens,
            threads=settings.threads,
        )
        for bundle in bundles:
            await self._load_one(bundle, options)
        # What is loaded stays: without this, a full collection walks all of it and every stream waits.
        gc.collect()
        gc.freeze()
        self._is_loading = False
        self._refresh()

    async def _load_one(self, bundle: FoundBundle, options: EngineOptions) -> None:
        entry = _entry(bundle, State.LOADING)
        metrics = self.metrics.model(entry.key, bundle.manifest.limits.max_model_len)
        try:
            served = await asyncio.to_thread(_load, bundle, self._settings.provider, options, metrics)
        except (BundleRefused, BundleError, ValueError) as error:
            self._refuse(entry, str(error))
            return
        except Exception:
            logger.exception("loading %s failed", entry.key)
            self._refuse(entry, "loading it failed unexpectedly; the server's log says more")
            return
        served.engine.start()
        self.catalog.put(_entry(bundle, State.READY, served=served))
        manifest = bundle.manifest
        metrics.loaded(
            served.load_seconds,
            sha256=bundle.sha256,
            family=manifest.family,
            precision=manifest.precision,
            target=manifest.target,
        )
        self._refresh()
        self._announce(f"READY {entry.key} ({manifest.precision}) in {served.load_seconds:.2f} s")

    def _refuse(self, entry: Entry, reason: str) -> None:
        self.catalog.put(
            Entry(name=entry.name, version=entry.version, state=State.UNAVAILABLE, reason=reason, found=entry.found)
        )
        self.metrics.refused_model(entry.key)
        self._announce(f"REFUSED {entry.key}: {reason}")

    # Health

    async def _watch(self) -> None:
        while True:
            self._last_beat = time.monotonic()
            self._refresh()
            await asyncio.sleep(_WATCH_SECONDS)

    def _refresh(self) -> None:
        """Work out every health status anew."""
        self._health.update(health_of(self.catalog, loading=self._is_loading, draining=self._is_draining))
        for model in self.catalog.served:
            model.metrics.serving(model.engine.healthy)

    def _is_alive(self) -> bool:
        """Whether neither the event loop nor an engine is stuck; asked from another thread."""
        beats = time.monotonic() - self._last_beat < _LOOP_STUCK_SECONDS
        return beats and self._health.is_healthy("liveness")

    # End

    async def stop(self, hurry: asyncio.Event | None = None) -> None:
        """Say that no more requests are welcome, let the running ones finish for `drain_seconds`, end the others.

        Args:
            hurry: once set, nothing is waited for any more.
        """
        settings = self._settings
        hurry = hurry or asyncio.Event()
        self._is_draining = True
        self._refresh()
        await _sleep(settings.drain_delay_seconds, hurry)
        self._health.close()
        deadline = time.monotonic() + settings.drain_seconds
        stopping = asyncio.create_task(self._server.stop(settings.drain_seconds + _LAST_WORDS_SECONDS))
        engines = [model.engine for model in self.catalog.served]
        draining = asyncio.gather(*(engine.drain(settings.drain_seconds) for engine in engines))
        await _first_of(draining, hurry)
        for engine in engines:
            await engine.close()
        # What the engines made may still be on its way to slow clients.
        left = 0.0 if hurry.is_set() else deadline - time.monotonic()
        await self._server.stop(max(left, _LAST_WORDS_SECONDS))
        await stopping
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._workers.close()
        if self._endpoint is not None:
            self._endpoint.close()


def _choose(found: Sequence[FoundBundle | RefusedBundle], wanted: Sequence[str]) -> list[FoundBundle | RefusedBundle]:
    """Return the bundles that were asked for: all, or by "name" (the newest version) or "name/version"."""
    by_key = {f"{name}/{number}": bundle for bundle in found for name, number in (_name_of(bundle),)}
    newest = {name: bundle for bundle in found for name, _ in (_name_of(bundle),)}  # `found` rises by version
    if not wanted:
        return list(found)
    unknown = [model for model in wanted if model not in by_key and model not in newest]
    if unknown:
        raise StartError(f"--models: no bundle {', '.join(unknown)}; known: {', '.join(by_key) or 'none'}")
    chosen = {_name_of(bundle): bundle for model in wanted for bundle in (by_key.get(model) or newest[model],)}
    return list(chosen.values())


def _name_of(bundle: FoundBundle | RefusedBundle) -> tuple[str, int]:
    if isinstance(bundle, RefusedBundle):
        return bundle.name, bundle.version
    return bundle.manifest.name, bundle.manifest.version


def _entry(bundle: FoundBundle, state: State, served: ServedModel | None = None) -> Entry:
    manifest = bundle.manifest
    return Entry(name=manifest.name, version=manifest.version, state=state, found=bundle, served=served)


def _load(bundle: FoundBundle, provider: str, options: EngineOptions, metrics: ModelMetrics) -> ServedModel:
    """Verify and load one bundle; blocks for seconds."""
    started = time.perf_counter()
    manifest = bundle.manifest
    if manifest.target != provider:
        raise BundleRefused(f"it was made for {manifest.target}, this server runs on {provider}")
    if manifest.vocabulary is None:
        raise BundleRefused("it has no vocabulary: this build serves text generation")
    engine = EngineLoop.load(bundle, options, metrics)
    codec = TextCodec(bundle.directory, manifest.vocabulary)
    seconds = time.perf_counter() - started
    return ServedModel(found=bundle, engine=engine, codec=codec, metrics=metrics, load_seconds=seconds)


async def _sleep(seconds: float, hurry: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hurry.wait(), seconds)


async def _first_of(work: "asyncio.Future[Any]", hurry: asyncio.Event) -> None:
    """Wait for some work, or until it is to be given up."""
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait([work, hurried], return_when=asyncio.FIRST_COMPLETED)
    for waiter in (work, hurried):
        waiter.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the draining.

    Raises:
        StartError: the server cannot start.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    app = App(settings, announce)
    try:
        await app.start()
        await _until_loaded(app, stop)
        await stop.wait()
    finally:
        _start_watchdog(settings.drain_delay_seconds + settings.drain_seconds + _WATCHDOG_SECONDS)
        await app.stop(hurry)


async def _until_loaded(app: App, stop: asyncio.Event) -> None:
    loaded, stopped = asyncio.create_task(app.wait_loaded()), asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
    for waiter in (loaded, stopped):
        waiter.cancel()
    if loaded in done:
        loaded.result()


def _start_watchdog(seconds: float) -> None:
    """End the process hard if draining hangs: a container that does not leave is killed without a word."""
    watchdog = threading.Timer(seconds, os._exit, (1,))
    watchdog.daemon = True
    watchdog.start()
