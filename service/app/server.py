"""One server, from its ports to its end.

The ports open first, so that a second server fails at once and probes have somebody to ask. Bundles are loaded one
after the other in a thread; each is served as soon as it has passed its checks, and one that has not is listed with the
reason (`bundle_keeper`).
"""

import asyncio
import contextlib
import gc
import logging
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import onnxruntime
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from attendant.v1 import inference_service_pb2, model_service_pb2
from service.app.backoff import Backoff
from service.app.bundle_keeper import BundleKeeper, Stage
from service.app.device_certificate import CertificateStore
from service.app.latency_store import LatencyStore
from service.app.listening import build_server, open_grpc_port, open_metrics_port
from service.app.loading import choose, entry_of, load
from service.app.start_error import StartError
from service.bundle import FoundBundle, RefusedBundle, scan
from service.encode_loop import EncodeOptions
from service.engine.device_identity import identify
from service.engine_loop import EngineLoop, EngineOptions
from service.metrics import MetricsEndpoint, ModelState, Objectives, ServerMetrics
from service.rpc.catalog import Entry, ModelCatalog, State
from service.rpc.health import HealthService
from service.rpc.inference import InferenceService
from service.rpc.models import ModelService
from service.rpc.readiness import INFERENCE_SERVICE, MODEL_SERVICE, health_of
from service.rpc.registration import handlers
from service.rpc.workers import TextWorkers
from service.scheduling.batching import BatchLimits
from service.settings import Settings

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 1.0
_KEEP_SECONDS = 60.0
_LOOP_STUCK_SECONDS = 30.0
_LAST_WORDS_SECONDS = 2.0
_WAITING_EXPLANATIONS = 16


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
        objectives = Objectives(
            first_token=settings.slo_first_token_seconds, inter_token=settings.slo_inter_token_seconds
        )
        self.metrics = ServerMetrics(settings.seq_buckets, objectives)
        self.metrics.build_info.labels(version("attendant"), platform.python_version(), onnxruntime.__version__).set(1)
        self._health = HealthService()
        self._workers = TextWorkers(settings.text_threads, settings.max_waiting_requests)
        self._explainers = TextWorkers(1, _WAITING_EXPLANATIONS, "explanations")
        self._server = build_server(settings)
        self._add_services()
        self._endpoint: MetricsEndpoint | None = None
        self._store, certificates = _stores(settings)
        self._stage = Stage(
            catalog=self.catalog,
            metrics=self.metrics,
            threads=[],
            store=self._store,
            certificates=certificates,
            announce=announce,
            refresh=self._refresh,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._keeping: list[asyncio.Task[None]] = []
        self._is_loading = True
        self._is_draining = False
        self._last_beat = time.monotonic()
        self._models: tuple[ModelState, ...] = ()  # for the status page, whose threads may not read the catalog
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
        bundles = self._survey()
        self.port = open_grpc_port(self._server, self._settings)
        self._endpoint = open_metrics_port(
            self.metrics,
            self._settings,
            alive=self._is_alive,
            ready=lambda: self._health.is_healthy("readiness"),
            models=lambda: self._models,
        )
        self._refresh()
        await self._server.start()
        self._announce(
            f"LISTENING {self._settings.host}: gRPC on port {self.port}, metrics on port {self.metrics_port}"
        )
        work = (self._load_all(bundles), self._watch(), self._keep_learned())
        self._tasks = [asyncio.create_task(coroutine) for coroutine in work]

    async def wait_loaded(self) -> None:
        """Wait until every bundle is served or refused.

        Raises:
            StartError: not one is served.
        """
        await asyncio.shield(self._tasks[0])
        if not self.catalog.served:
            raise StartError(f"no bundle of {self._settings.repository} can be served")

    def _survey(self) -> list[FoundBundle | RefusedBundle]:
        """Return what is to be served of the repository, and list it."""
        try:
            found = scan(self._settings.repository)
        except OSError as error:  # there is none, or it may not be read
            raise StartError(str(error)) from error
        chosen = choose(found, self._settings.models)
        if not chosen:
            raise StartError(f"repository {self._settings.repository} holds no bundle")
        for bundle in chosen:
            self.catalog.put(entry_of(bundle, State.LOADING))
        return chosen

    def _add_services(self) -> None:
        settings = self._settings
        inference = InferenceService(
            self.catalog, self._workers, self._explainers, self.metrics, settings.max_prompt_bytes
        )
        services: list[tuple[Any, object, Any]] = [
            (inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"], inference, inference.ended),
            (model_service_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(self.catalog), None),
            (health_pb2.DESCRIPTOR.services_by_name["Health"], self._health, None),
        ]
        self._server.add_generic_rpc_handlers(
            [handlers(service, servicer, self.metrics, ended) for service, servicer, ended in services]
        )
        if settings.reflection:
            names = (INFERENCE_SERVICE, MODEL_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    # Loading

    async def _load_all(self, bundles: Sequence[FoundBundle | RefusedBundle]) -> None:
        settings = self._settings
        to_load = [bundle for bundle in bundles if isinstance(bundle, FoundBundle)]
        manifests = [found.manifest for found in to_load if found.manifest.target == settings.provider]
        num_generating = max(1, sum("generate" in manifest.tasks for manifest in manifests))
        memory = settings.states_memory
        options = EngineOptions(
            num_slots=settings.max_num_seqs,
            max_waiting_requests=settings.max_waiting_requests,
            kv_memory=None if memory is None else memory // num_generating,
            num_bundles=num_generating,
            cuda_graphs=settings.cuda_graphs,
            prefill_chunk_tokens=settings.prefill_chunk_tokens,
            idle_chunk_tokens=settings.idle_chunk_tokens,
            inter_token_target_seconds=settings.inter_token_target_seconds,
            ageing_seconds=settings.ageing_seconds,
            canary_rate=settings.canary_rate,
            idle_release_seconds=settings.idle_release_seconds,
            threads=settings.threads,
        )
        encode_options = EncodeOptions(
            max_waiting_requests=settings.max_waiting_requests,
            limits=BatchLimits(max_tokens=settings.max_batch_tokens),
            max_delay_seconds=settings.max_batch_delay_seconds,
            ageing_seconds=settings.ageing_seconds,
            threads=settings.threads,
        )
        for bundle in bundles:
            if isinstance(bundle, RefusedBundle):
                self._refuse(bundle)
        for bundle in to_load:
            load_it = partial(load, bundle, settings.provider, options, encode_options, self.metrics)
            backoff = Backoff(tries=settings.restart_tries, first_seconds=settings.restart_delay_seconds)
            keeper = BundleKeeper(bundle, load_it, self._stage, backoff)
            await keeper.open()
            self._keeping.append(asyncio.create_task(keeper.keep()))
        # What is loaded stays: without this, a full collection walks all of it and every stream waits.
        gc.collect()
        gc.freeze()
        self._is_loading = False
        self._refresh()

    def _refuse(self, bundle: RefusedBundle) -> None:
        entry = entry_of(bundle, State.UNAVAILABLE, bundle.reason)
        self.catalog.put(entry)
        self.metrics.refused_model(entry.key)
        self._announce(f"REFUSED {entry.key}: {bundle.reason}")

    async def _keep_learned(self) -> None:
        while True:
            await asyncio.sleep(_KEEP_SECONDS)
            await self._save_learned()

    async def _save_learned(self) -> None:
        """Keep what the latency models know, if there is a place for it; a slow disk stops nothing else."""
        if self._store is None:
            return
        for model in self.catalog.served:
            await asyncio.to_thread(self._store.save, model.found, model.loop.latency.to_dict())

    # Health

    async def _watch(self) -> None:
        while True:
            self._last_beat = time.monotonic()
            self._refresh()
            for model in self.catalog.served:
                if isinstance(model.loop, EngineLoop):
                    model.loop.tick()
            await asyncio.sleep(_WATCH_SECONDS)
            self.metrics.lag.observe(time.monotonic() - self._last_beat - _WATCH_SECONDS)

    def _refresh(self) -> None:
        """Work out every health status anew."""
        self._health.update(health_of(self.catalog, loading=self._is_loading, draining=self._is_draining))
        for model in self.catalog.served:
            model.metrics.serving(model.loop.healthy)
        self._models = tuple(map(_model_state, self.catalog.entries))

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
        for task in (*self._tasks[:1], *self._keeping):
            task.cancel()  # nothing more is loaded
        self._refresh()
        await _sleep(settings.drain_delay_seconds, hurry)
        self._health.close()
        deadline = time.monotonic() + settings.drain_seconds
        stopping = asyncio.create_task(self._server.stop(settings.drain_seconds + _LAST_WORDS_SECONDS))
        engines = [model.loop for model in self.catalog.served]
        draining = asyncio.gather(*(engine.drain(settings.drain_seconds) for engine in engines))
        await _first_of(draining, hurry)
        for engine in engines:
            await engine.close()
        # What the engines made may still be on its way to slow clients.
        left = 0.0 if hurry.is_set() else deadline - time.monotonic()
        await self._server.stop(max(left, _LAST_WORDS_SECONDS))
        await stopping
        await self._cancel_tasks()
        await self._save_learned()
        self._workers.close()
        self._explainers.close()
        if self._endpoint is not None:
            self._endpoint.close()

    async def _cancel_tasks(self) -> None:
        tasks = self._tasks + self._keeping
        for task in tasks:
            task.cancel()
        for error in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(error, Exception):
                logger.error("a task of the server failed", exc_info=error)


def _stores(settings: Settings) -> tuple[LatencyStore | None, CertificateStore | None]:
    """Return what keeps what is learned and measured, if there is a directory for it and the device can be told."""
    if settings.state_dir is None:
        return None, None
    try:
        device = identify(settings.provider)
    except OSError as error:
        logger.warning("nothing is kept of this device, which cannot be told: %s", error)
        return None, None
    learned_on = None if settings.provider == "cpu" else device
    store = LatencyStore(settings.state_dir, settings.threads, learned_on)
    return store, CertificateStore(settings.state_dir, device)


def _model_state(entry: Entry) -> ModelState:
    is_stuck = entry.served is not None and not entry.served.loop.healthy
    state = State.UNAVAILABLE if is_stuck else entry.state
    return ModelState(model=entry.key, state=state.value, reason=entry.reason)


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
