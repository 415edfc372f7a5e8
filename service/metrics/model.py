"""The metrics of one model: a method for each thing that happens, the labelled children looked up once.

`first_token` and `inter_token` are called for every token, so they cost one bisection, one observation and one
increment, about a microsecond. All methods may be called from any thread.
"""

from collections.abc import Sequence
from functools import partial
from math import nan
from typing import TYPE_CHECKING, Literal

from prometheus_client import Histogram

from service.metrics.buckets import SeqBuckets
from service.scheduling.latency import LatencyModel
from service.scheduling.work import Phase

if TYPE_CHECKING:
    from service.metrics.catalogue import ServerMetrics

Task = Literal["generate", "embed", "classify", "tag", "fill_mask", "score"]
End = Literal["stop", "eos", "length", "complete", "cancelled", "deadline", "error"]

_ENCODER_TASKS: tuple[Task, ...] = ("embed", "classify", "tag", "fill_mask", "score")
PHASES: dict[Task, tuple[Phase, ...]] = {
    "generate": ("encode", "prefill", "decode"),
    **dict.fromkeys(_ENCODER_TASKS, ("encode",)),
}
"""What a graph is run for, by task."""
_FAILURES: tuple[End, ...] = ("cancelled", "deadline", "error")
TERMS = ("constant", "linear", "quadratic")
"""What a run costs: once, for each token, for each position that a token attends to."""
ENDS: dict[Task, tuple[End, ...]] = {
    "generate": ("stop", "eos", "length", *_FAILURES),
    **dict.fromkeys(_ENCODER_TASKS, ("complete", *_FAILURES)),
}
"""How a request ends, by task."""
CODES = (
    "OK",
    "CANCELLED",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
)
REJECTIONS = (
    "invalid_field",
    "context_length_exceeded",
    "unsupported",
    "queue_full",
    "server_draining",
    "model_unavailable",
)


class ModelMetrics:
    """What is measured of one model; made by `ServerMetrics.model`.

    Args:
        families: where the children live.
        model: "name/version".
        seq_buckets: the lengths that latencies are told apart by.
        task: what the model is asked for; it decides which children there are.
    """

    def __init__(self, families: "ServerMetrics", model: str, seq_buckets: SeqBuckets, task: Task = "generate") -> None:
        self._seq_buckets = seq_buckets
        generates = task == "generate"

        def by_length(family: Histogram, *labels: str) -> Sequence[Histogram]:
            return tuple(family.labels(model, *labels, bucket) for bucket in seq_buckets.labels)

        if generates:
            self._time_to_first_token = by_length(families.time_to_first_token)
            self._inter_token_latency = by_length(families.inter_token_latency)
            self._request_prefill = by_length(families.request_prefill)
            self._output_lengths = families.output_tokens.labels(model)
        self._request_duration = by_length(families.request_duration, task)
        self._request_queue = by_length(families.request_queue)
        self._step = {phase: families.step.labels(model, phase) for phase in PHASES[task]}
        self._batch_size = {phase: families.batch_size.labels(model, phase) for phase in PHASES[task]}
        self._prompt_lengths = families.prompt_tokens.labels(model)
        self._real_tokens = families.batch_tokens.labels(model, "real")
        self._padding_tokens = families.batch_tokens.labels(model, "padding")
        self._prompt_tokens = families.tokens.labels(model, "prompt")
        self._cached_tokens = families.tokens.labels(model, "prompt_cached")
        self._output_tokens = families.tokens.labels(model, "output")
        self._finished = {end: families.finished.labels(model, end) for end in ENDS[task]}
        self._latency_error = {phase: families.latency_error.labels(model, phase) for phase in PHASES[task]}
        self._latency_observations = {
            phase: families.latency_observations.labels(model, phase) for phase in PHASES[task]
        }
        self._latency_coefficients = {
            phase: [families.latency_coefficient.labels(model, phase, term) for term in TERMS] for phase in PHASES[task]
        }
        self._waiting = families.waiting.labels(model)
        self._running = families.running.labels(model)
        self._kv_usage = families.kv_usage.labels(model)
        self._kv_used = families.kv_tokens.labels(model, "used")
        self._kv_free = families.kv_tokens.labels(model, "free")
        self._ready = families.ready.labels(model)
        self._load_seconds = families.load_seconds.labels(model)
        self._info = families.model_info
        self._model = model
        for code in CODES:
            families.requests.labels(model, task, code)
        for reason in REJECTIONS:
            families.rejected.labels(model, reason)

    def first_token(self, prompt_tokens: int, seconds: float) -> None:
        """A request got its first token, so long after it arrived."""
        self._time_to_first_token[self._seq_buckets.index(prompt_tokens)].observe(seconds)
        self._output_tokens.inc()

    def searched(self, prompt_tokens: int, seconds: float, output_tokens: int) -> None:
        """A request got all of its answers at once, so long after it arrived."""
        self._time_to_first_token[self._seq_buckets.index(prompt_tokens)].observe(seconds)
        self._output_tokens.inc(output_tokens)

    def inter_token(self, context_tokens: int, seconds: float, count: int = 1) -> None:
        """A request got its next token, so long after the one before; `count` such gaps at once."""
        latency = self._inter_token_latency[self._seq_buckets.index(context_tokens)]
        for _ in range(count):
            latency.observe(seconds)
        self._output_tokens.inc(count)

    def queued(self, prompt_tokens: int, seconds: float) -> None:
        """A request got a slot, so long after it arrived."""
        self._request_queue[self._seq_buckets.index(prompt_tokens)].observe(seconds)

    def prefilled(self, prompt_tokens: int, seconds: float, cached_tokens: int = 0) -> None:
        """A prompt was computed, all but the cached tokens of it."""
        self._request_prefill[self._seq_buckets.index(prompt_tokens)].observe(seconds)
        self._prompt_tokens.inc(prompt_tokens - cached_tokens)
        self._cached_tokens.inc(cached_tokens)

    def step(self, phase: Phase, rows: int, real_tokens: int, padding_tokens: int, seconds: float) -> None:
        """The graph ran once over `rows` sequences."""
        self._step[phase].observe(seconds)
        self._batch_size[phase].observe(rows)
        self._real_tokens.inc(real_tokens)
        self._padding_tokens.inc(padding_tokens)

    def occupancy(self, waiting: int, running: int, kv_tokens_used: int, kv_tokens_total: int) -> None:
        """What is held now: requests, and tokens of the KV budget."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._kv_usage.set(kv_tokens_used / kv_tokens_total if kv_tokens_total else 0.0)
        self._kv_used.set(kv_tokens_used)
        self._kv_free.set(kv_tokens_total - kv_tokens_used)

    def succeeded(self, end: End, prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """A request ended well, so long after it arrived."""
        self._finished[end].inc()
        self._request_duration[self._seq_buckets.index(prompt_tokens)].observe(seconds)
        self._prompt_lengths.observe(prompt_tokens)
        self._output_lengths.observe(output_tokens)

    def encoded(self, num_tokens: int, seconds: float) -> None:
        """A text or an image got its answer, so long after its call arrived."""
        self._request_duration[self._seq_buckets.index(num_tokens)].observe(seconds)
        self._prompt_lengths.observe(num_tokens)
        self._prompt_tokens.inc(num_tokens)

    def completed(self) -> None:
        """A call that is no stream ended well."""
        self._finished["complete"].inc()

    def failed(self, end: End) -> None:
        """An accepted request ended otherwise."""
        self._finished[end].inc()

    def loaded(self, seconds: float, *, sha256: str, family: str, precision: str, target: str) -> None:
        """The model is served from now on."""
        name, _, version = self._model.partition("/")
        self._info.labels(self._model, name, version, sha256, family, precision, target).set(1)
        self._load_seconds.set(seconds)
        self._ready.set(1)

    def latency(self, latency: LatencyModel) -> None:
        """Show what this model learns, whenever somebody looks; what is not known is NaN."""
        for phase, coefficients in self._latency_coefficients.items():
            for index, coefficient in enumerate(coefficients):
                coefficient.set_function(partial(_coefficient, latency, phase, index))
            self._latency_error[phase].set_function(partial(_error, latency, phase))
            self._latency_observations[phase].set_function(partial(latency.observations, phase))

    def serving(self, healthy: bool) -> None:
        """The model can be called now, or cannot."""
        self._ready.set(healthy)


def _coefficient(latency: LatencyModel, phase: Phase, index: int) -> float:
    coefficients = latency.coefficients(phase)
    return nan if coefficients is None else coefficients[index]


def _error(latency: LatencyModel, phase: Phase) -> float:
    error = latency.error(phase)
    return nan if error is None else error
