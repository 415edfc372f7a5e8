"""Every metric family of the service, declared once; docs/metrics.md is made from what is declared here.

Labels are bounded: models come from the repository, never from a request, and lengths come as `seq_bucket`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

from service.metrics import buckets
from service.metrics.histogram import Histogram

BY_LENGTH = ("model", "seq_bucket")
BY_PHASE = ("model", "phase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric as docs/metrics.md shows it; `bounds` are those of a histogram's buckets."""

    section: str
    name: str
    kind: Literal["histogram", "counter", "gauge"]
    unit: str
    labels: tuple[str, ...]
    meaning: str
    bounds: tuple[float, ...] = ()


class Catalogue:
    """The families, in a registry of their own.

    Args:
        objectives: exact bounds of the histograms that they concern.
    """

    def __init__(self, objectives: buckets.Objectives) -> None:
        # A creation time beside each counter would double them. The library has one switch for the process.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # its only unannotated function
        self.registry = CollectorRegistry()
        self.families: list[Family] = []
        self._declare_latencies(objectives)
        self._declare_objectives()
        self._declare_batches()
        self._declare_latency_model()
        self._declare_requests()
        self._declare_memory()
        self._declare_models()
        self._declare_server()

    def _declare_latencies(self, objectives: buckets.Objectives) -> None:
        self._section = "Latency, by sequence length"
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token, by prompt length.",
            BY_LENGTH,
            buckets.doubling(21, objectives.first_token),  # to 105 s
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between two tokens of one request, by context length at the later one.",
            BY_LENGTH,
            buckets.doubling(15, objectives.inter_token),  # to 1.6 s
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds",
            "Mean time between the tokens of a successful request, by prompt length.",
            BY_LENGTH,
            tuple(sorted({*(bound for bound in buckets.COARSE_SECONDS if bound <= 3), objectives.inter_token})),
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "From arrival to the end of a successful request, by prompt length.",
            ("model", "task", "seq_bucket"),
            buckets.doubling(21, objectives.duration),
        )
        self.request_queue = self._histogram(
            "request_queue_seconds",
            "From arrival to the first step that computes something of it: tokenising and waiting, by prompt length.",
            BY_LENGTH,
            buckets.COARSE_SECONDS,
        )
        self.request_prefill = self._histogram(
            "request_prefill_seconds",
            "From the first prefill step to the first token, by prompt length.",
            BY_LENGTH,
            buckets.COARSE_SECONDS,
        )

    def _declare_objectives(self) -> None:
        self._section = "Objectives"
        self.slo_requests = self._counter(
            "slo_requests_total",
            "Requests within and over an objective, by prompt length: the first token's time when it came, "
            "the mean time between tokens when the request succeeded.",
            ("model", "objective", "seq_bucket", "outcome"),
        )
        self.slo_target = self._gauge(
            "slo_target_seconds", "The objective that requests are counted by.", ("objective",)
        )
        self.deadline_requests = self._counter(
            "deadline_requests_total",
            "Requests that brought a deadline: met, missed while they waited or ran, refused because it could not be "
            "met.",
            ("model", "outcome"),
        )

    def _declare_batches(self) -> None:
        self._section = "Batches"
        self.step = self._histogram("step_seconds", "One run of a graph.", BY_PHASE, buckets.COARSE_SECONDS)
        self.batch_size = self._histogram("batch_size", "Sequences that ran together.", BY_PHASE, buckets.BATCH_ROWS)
        self.batch_tokens = self._counter(
            "batch_tokens_total",
            "Tokens that went through a graph; padding are positions and rows that ran for nobody.",
            ("model", "phase", "kind"),
        )
        self.tokens = self._counter(
            "tokens_total", "Tokens of requests; cached ones of a prompt were copied, not computed.", ("model", "kind")
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt lengths of successful requests.", ("model",), buckets.TOKENS
        )
        self.output_tokens = self._histogram(
            "request_output_tokens", "Answer lengths of successful requests.", ("model",), buckets.TOKENS
        )

    def _declare_latency_model(self) -> None:
        self._section = "What a length costs"
        self.latency_coefficient = self._gauge(
            "latency_model_coefficient",
            "Seconds, as learned, of a run, of each token in it, and of each position that a token attends to, while "
            "the bundle computes alone or, if it never did, beside as few others as it has; NaN before 16 runs.",
            ("model", "phase", "term"),
        )
        self.latency_error = self._gauge(
            "latency_model_error_ratio",
            "Median relative error of the newest 256 runs, each predicted before it was learned from; NaN before there "
            "is one.",
            BY_PHASE,
        )
        self.latency_observations = self._gauge(
            "latency_model_observations", "Runs that the latency model has learned from.", BY_PHASE
        )

    def _declare_requests(self) -> None:
        self._section = "Requests"
        self.requests = self._counter(
            "requests_total", "Calls that ended, by gRPC status code.", ("model", "task", "code")
        )
        self.finished = self._counter(
            "requests_finished_total", "Accepted requests that ended, by reason.", ("model", "reason")
        )
        self.rejected = self._counter(
            "requests_rejected_total",
            "Requests turned away at the door, by the reason of docs/errors.md in lower case.",
            ("model", "reason"),
        )
        self.waiting = self._gauge("requests_waiting", "Requests that wait for a slot.", ("model",))
        self.running = self._gauge("requests_running", "Requests that hold a slot.", ("model",))
        self.queue_tokens = self._gauge(
            "queue_tokens", "Prompt tokens of all requests that are not computed yet.", ("model",)
        )
        self.predicted_queue = self._gauge(
            "predicted_queue_seconds",
            "How long a request that came now would wait before it is computed, as the latency model predicts; 0 "
            "before it can. What to scale on.",
            ("model",),
        )

    def _declare_memory(self) -> None:
        self._section = "KV cache"
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "Share of the token budget that is reserved.", ("model",))
        self.kv_tokens = self._gauge(
            "kv_cache_tokens",
            "The token budget: reserved by requests, committed to what finished ones left for reuse, free.",
            ("model", "state"),
        )
        self.kv_capacity = self._gauge("kv_cache_capacity_tokens", "The token budget as a whole.", ("model",))
        self.kv_config = self._gauge(
            "kv_cache_config_info",
            "Always 1; says how the budget is cut: tokens of a block, blocks, sequences at once.",
            ("model", "block_size", "num_blocks", "num_slots"),
        )
        self.prefix_requests = self._counter(
            "prefix_cache_requests_total", "Prompts that began with what was there, or did not.", ("model", "result")
        )
        self.prefix_evictions = self._counter(
            "prefix_cache_evictions_total",
            "Slots that lost what they held of earlier requests, for want of memory.",
            ("model",),
        )

    def _declare_models(self) -> None:
        self._section = "What is served"
        self.ready = self._gauge(
            "model_ready", "1 if it can be called; 0 if it is loading, was refused or is stuck.", ("model",)
        )
        self.load_seconds = self._gauge("model_load_seconds", "From the start of verification to READY.", ("model",))
        self.loaded_timestamp = self._gauge(
            "model_loaded_timestamp_seconds", "When it became READY, in Unix time.", ("model",)
        )
        self.replays = self._counter(
            "canary_replays_total",
            "Finished greedy requests computed once more, alone: to the same tokens, to different ones, or not at all, "
            "because nothing was idle for a minute.",
            ("model", "result"),
        )
        self.restarts = self._counter(
            "model_restarts_total",
            "Times that a model was loaded again after it had failed, or could not be.",
            ("model", "result"),
        )
        self.model_info = self._gauge(
            "model_info",
            "Always 1; says what is served.",
            ("model", "name", "version", "sha256", "family", "precision", "target"),
        )
        self.build_info = self._gauge(
            "build_info", "Always 1; says which versions run.", ("version", "python", "onnxruntime")
        )

    def _declare_server(self) -> None:
        self._section = "The server"
        calls = ("grpc_type", "grpc_service", "grpc_method")
        self.calls_started = self._counter("grpc_server_started_total", "Calls that came in.", calls, prefix="")
        self.calls_handled = self._counter(
            "grpc_server_handled_total", "Calls that ended, by status code.", (*calls, "grpc_code"), prefix=""
        )
        self.calls_handling = self._histogram(
            "grpc_server_handling_seconds", "From a call to its end.", calls, buckets.CALL_SECONDS, prefix=""
        )
        self.messages_sent = self._counter(
            "grpc_server_msg_sent_total", "Messages that were sent in answer.", calls, prefix=""
        )
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "How late the event loop, which carries every call, wakes: looked at once a second.",
            (),
            buckets.COARSE_SECONDS,
        )
        self.scrape_seconds = self._gauge(
            "scrape_seconds", "What the scrape before this one took to render, in a thread of its own."
        )

    def _histogram(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float], prefix: str = "attendant_"
    ) -> Histogram:
        family = self._declare(prefix + name, text, labels, "histogram", tuple(map(float, bounds)))
        return Histogram(family.name, text, labels, bounds, unit=family.unit, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str], prefix: str = "attendant_") -> Counter:
        family = self._declare(prefix + name, text, labels, "counter")
        return Counter(family.name, text, labels, unit=family.unit, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        family = self._declare(f"attendant_{name}", text, labels, "gauge")
        return Gauge(family.name, text, labels, unit=family.unit, registry=self.registry)

    def _declare(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        kind: Literal["histogram", "counter", "gauge"],
        bounds: tuple[float, ...] = (),
    ) -> Family:
        last = name.removesuffix("_total").rpartition("_")[2]
        family = Family(
            section=self._section,
            name=name,
            kind=kind,
            unit=last if last in ("seconds", "tokens", "ratio", "bytes") else "",
            labels=tuple(labels),
            meaning=text,
            bounds=bounds,
        )
        self.families.append(family)
        return family
