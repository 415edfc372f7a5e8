"""Every metric family of the service, declared once.

Labels are bounded: models come from the repository, never from a request (those count as "_unknown"), and
lengths come as `seq_bucket`. Every child that can be known is made at once, so that rates start at zero.
"""

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from service.metrics import buckets
from service.metrics.model import ModelMetrics, Task

UNKNOWN_MODEL = "_unknown"


class ServerMetrics:
    """The families, in a registry of their own, and the metrics of each model.

    Args:
        seq_buckets: bounds of the `seq_bucket` label, in tokens.
    """

    def __init__(self, seq_buckets: Sequence[int] = buckets.DEFAULT_SEQ_BUCKETS) -> None:
        # A creation time beside each counter would double them. The library has one switch for the process.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # its only unannotated function
        self.registry = CollectorRegistry()
        self._seq_buckets = tuple(seq_buckets)
        self._declare_latencies()
        self._declare_sizes()
        self._declare_counts()
        self._declare_latency_model()
        self._declare_models()
        ProcessCollector(registry=self.registry)

    def _declare_latencies(self) -> None:
        by_length = ("model", "seq_bucket")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token, by prompt length.",
            by_length,
            buckets.FIRST_TOKEN_SECONDS,
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between two tokens of one request, by context length at the later one.",
            by_length,
            buckets.INTER_TOKEN_SECONDS,
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "From arrival to the end of a successful request, by prompt length.",
            ("model", "task", "seq_bucket"),
            buckets.DURATION_SECONDS,
        )
        self.request_queue = self._histogram(
            "request_queue_seconds",
            "Waiting for a slot, by prompt length.",
            by_length,
            buckets.COARSE_SECONDS,
        )
        self.request_prefill = self._histogram(
            "request_prefill_seconds",
            "From the first prefill step to the first token, by prompt length.",
            by_length,
            buckets.COARSE_SECONDS,
        )
        self.step = self._histogram("step_seconds", "One run of a graph.", ("model", "phase"), buckets.COARSE_SECONDS)

    def _declare_sizes(self) -> None:
        self.batch_size = self._histogram(
            "batch_size", "Sequences that ran together.", ("model", "phase"), buckets.BATCH_ROWS
        )
        token_bounds = buckets.powers_of_two(8192)
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt lengths of successful requests.", ("model",), token_bounds
        )
        self.output_tokens = self._histogram(
            "request_output_tokens", "Answer lengths of successful requests.", ("model",), token_bounds
        )

    def _declare_counts(self) -> None:
        self.batch_tokens = self._counter(
            "batch_tokens_total", "Tokens that went through a graph, real or padding.", ("model", "kind")
        )
        self.tokens = self._counter(
            "tokens_total", "Tokens of requests: prompt, prompt_cached, output.", ("model", "kind")
        )
        self.requests = self._counter(
            "requests_total", "Calls that ended, by gRPC status code.", ("model", "task", "code")
        )
        self.finished = self._counter(
            "requests_finished_total", "Accepted requests that ended, by reason.", ("model", "reason")
        )
        self.rejected = self._counter(
            "requests_rejected_total", "Requests turned away at the door, by reason.", ("model", "reason")
        )

    def _declare_latency_model(self) -> None:
        self.latency_coefficient = self._gauge(
            "latency_model_coefficient",
            "Seconds, as learned, of a run, of each token in it, and of each position that a token attends to.",
            ("phase", "term"),
        )
        self.latency_error = self._gauge(
            "latency_model_error_ratio", "Median relative error of the newest predicted runs.", ("phase",)
        )
        self.latency_observations = self._gauge(
            "latency_model_observations", "Runs that the latency model has learned from.", ("phase",)
        )

    def _declare_models(self) -> None:
        self.waiting = self._gauge("requests_waiting", "Requests that wait for a slot.")
        self.running = self._gauge("requests_running", "Requests that hold a slot.")
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "Share of the KV token budget that is reserved.")
        self.kv_tokens = self._gauge("kv_cache_tokens", "The KV token budget: used and free.", ("state",))
        self.ready = self._gauge("model_ready", "1 if the model is served, 0 if it is refused or loading.")
        self.load_seconds = self._gauge("model_load_seconds", "From the start of verification to READY.")
        self.model_info = self._gauge(
            "model_info",
            "Always 1; says what is served.",
            ("name", "version", "sha256", "family", "precision", "target"),
        )
        self.build_info = Gauge(
            "attendant_build_info",
            "Always 1; says which versions run.",
            ("version", "python", "onnxruntime"),
            registry=self.registry,
        )

    def _histogram(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> Histogram:
        return Histogram(f"attendant_{name}", text, labels, buckets=bounds, registry=self.registry)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(f"attendant_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"attendant_{name}", text, ("model", *labels), registry=self.registry)

    def model(self, model: str, longest: int, task: Task = "generate") -> ModelMetrics:
        """Return the metrics of one model.

        Args:
            model: "name/version".
            longest: its longest sequence, in tokens, that of its source included.
            task: what it is asked for.
        """
        return ModelMetrics(self, model, buckets.SeqBuckets(self._seq_buckets, longest), task)

    def refused_model(self, model: str) -> None:
        """Say that a bundle of the repository is not served."""
        self.ready.labels(model).set(0)

    def answered(self, model: str | None, task: str, code: str) -> None:
        """Count a call that ended with this gRPC code; without a model of the repository it is "_unknown"."""
        self.requests.labels(model or UNKNOWN_MODEL, task, code).inc()

    def turned_away(self, model: str | None, reason: str) -> None:
        """Count a request that was not accepted."""
        self.rejected.labels(model or UNKNOWN_MODEL, reason).inc()
