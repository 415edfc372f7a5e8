"""The metrics of one model: a method for each thing that happens, the labelled children looked up once.

`inter_token` is called for every token, so it costs two bisections and little more, about half a microsecond. All
methods that happen while serving are called on the event loop.
"""

from collections.abc import Sequence
from functools import partial
from math import nan
from typing import TYPE_CHECKING, Literal, get_args

from service.errors import AttendantError
from service.metrics.buckets import Objectives, SeqBuckets
from service.metrics.histogram import Histogram, Observations
from service.scheduling.canary import Result
from service.scheduling.latency import LatencyModel
from service.scheduling.work import Phase

if TYPE_CHECKING:
    from service.metrics.catalogue import Catalogue

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
_MAX_EXEMPLAR = 118  # characters of a request's id: with the label's name 128, which is what OpenMetrics allows


def rejections() -> list[str]:
    """Return every reason for which a request can be turned away."""
    return sorted({kind.reason.lower() for kind in AttendantError.__subclasses__()} - {"model_not_found"})


RESTARTS = ("succeeded", "failed")
REPLAYS: tuple[Result, ...] = get_args(Result)


class ModelMetrics:
    """What is measured of one model; made by `ServerMetrics.model`.

    Args:
        families: where the children live.
        model: "name/version".
        seq_buckets: the lengths that latencies are told apart by.
        objectives: that requests are counted by.
        task: what the model is asked for; it decides which children there are.
    """

    def __init__(
        self,
        families: "Catalogue",
        model: str,
        seq_buckets: SeqBuckets,
        objectives: Objectives,
        task: Task = "generate",
    ) -> None:
        self._families = families
        self._model = model
        self._seq_buckets = seq_buckets
        self._objectives = objectives
        if task == "generate":
            self._make_generating()
        self._request_duration = self._by_length(families.request_duration, task)
        self._request_queue = self._by_length(families.request_queue)
        self._finished = {end: families.finished.labels(model, end) for end in ENDS[task]}
        self._deadline_met = families.deadline_requests.labels(model, "met")
        self._deadline_missed = families.deadline_requests.labels(model, "missed")
        families.deadline_requests.labels(model, "refused")
        self._prompt_lengths = families.prompt_tokens.labels(model)
        self._prompt_tokens = families.tokens.labels(model, "prompt")
        self._make_phases(PHASES[task])
        self._waiting = families.waiting.labels(model)
        self._running = families.running.labels(model)
        self._queue_tokens = families.queue_tokens.labels(model)
        self._predicted_queue = families.predicted_queue.labels(model)
        self._ready = families.ready.labels(model)
        self._load_seconds = families.load_seconds.labels(model)
        self._loaded_timestamp = families.loaded_timestamp.labels(model)
        for code in CODES:
            families.requests.labels(model, task, code)
        for reason in rejections():
            families.rejected.labels(model, reason)
        for result in RESTARTS:
            families.restarts.labels(model, result)

    def _by_length(self, family: Histogram, *labels: str) -> Sequence[Observations]:
        return tuple(family.labels(self._model, *labels, bucket) for bucket in self._seq_buckets.labels)

    def _make_generating(self) -> None:
        self._replays = {result: self._families.replays.labels(self._model, result) for result in REPLAYS}
        families, model = self._families, self._model
        self._time_to_first_token = self._by_length(families.time_to_first_token)
        self._inter_token_latency = self._by_length(families.inter_token_latency)
        self._time_per_output_token = self._by_length(families.time_per_output_token)
        self._request_prefill = self._by_length(families.request_prefill)
        self._output_lengths = families.output_tokens.labels(model)
        self._slo = {
            objective: [
                {over: families.slo_requests.labels(model, objective, bucket, outcome) for over, outcome in _OUTCOMES}
                for bucket in self._seq_buckets.labels
            ]
            for objective in ("first_token", "inter_token")
        }
        self._cached_tokens = families.tokens.labels(model, "prompt_cached")
        self._output_tokens = families.tokens.labels(model, "output")
        self._prefix_hits = families.prefix_requests.labels(model, "hit")
        self._prefix_misses = families.prefix_requests.labels(model, "miss")
        self._prefix_evictions = families.prefix_evictions.labels(model)
        self._kv_usage = families.kv_usage.labels(model)
        self._kv_used, self._kv_cached, self._kv_free = (
            families.kv_tokens.labels(model, state) for state in ("used", "cached", "free")
        )
        self._kv_capacity = families.kv_capacity.labels(model)
        self._kv_total = 0

    def _make_phases(self, phases: Sequence[Phase]) -> None:
        families, model = self._families, self._model
        self._step = {phase: families.step.labels(model, phase) for phase in phases}
        self._batch_size = {phase: families.batch_size.labels(model, phase) for phase in phases}
        self._real_tokens = {phase: families.batch_tokens.labels(model, phase, "real") for phase in phases}
        self._padding_tokens = {phase: families.batch_tokens.labels(model, phase, "padding") for phase in phases}
        self._latency_error = {phase: families.latency_error.labels(model, phase) for phase in phases}
        self._latency_observations = {phase: families.latency_observations.labels(model, phase) for phase in phases}
        self._latency_coefficients = {
            phase: [families.latency_coefficient.labels(model, phase, term) for term in TERMS] for phase in phases
        }

    # A request

    def queued(self, prompt_tokens: int, seconds: float, request_id: str = "") -> None:
        """Something of a request is computed for the first time, so long after it arrived."""
        self._request_queue[self._seq_buckets.index(prompt_tokens)].observe(seconds, _exemplar(request_id))

    def prefilled(self, prompt_tokens: int, seconds: float, cached_tokens: int = 0, request_id: str = "") -> None:
        """A prompt was computed, all but the cached tokens of it."""
        self._request_prefill[self._seq_buckets.index(prompt_tokens)].observe(seconds, _exemplar(request_id))
        self._prompt_tokens.inc(prompt_tokens - cached_tokens)
        self._cached_tokens.inc(cached_tokens)
        (self._prefix_hits if cached_tokens else self._prefix_misses).inc()

    def first_token(self, prompt_tokens: int, seconds: float, request_id: str = "") -> None:
        """A request got its first token, or all of a beam search's answers, so long after it arrived."""
        index = self._seq_buckets.index(prompt_tokens)
        self._time_to_first_token[index].observe(seconds, _exemplar(request_id))
        self._slo["first_token"][index][seconds > self._objectives.first_token].inc()

    def inter_token(self, context_tokens: int, seconds: float, request_id: str = "") -> None:
        """A request got its next token, so long after the one before; one over the objective leaves its name."""
        exemplar = _exemplar(request_id) if seconds > self._objectives.inter_token else None
        self._inter_token_latency[self._seq_buckets.index(context_tokens)].observe(seconds, exemplar)

    def generated(self, num_tokens: int) -> None:
        """So many tokens of answers were made since this was last called."""
        self._output_tokens.inc(num_tokens)

    def succeeded(
        self,
        end: End,
        prompt_tokens: int,
        output_tokens: int,
        seconds: float,
        *,
        first_token_seconds: float | None = None,
        has_deadline: bool = False,
        request_id: str = "",
    ) -> None:
        """A request ended well.

        Args:
            end: how.
            prompt_tokens: of its prompt.
            output_tokens: of its answer.
            seconds: since it arrived.
            first_token_seconds: from its arrival to its first token; None if it got all at once.
            has_deadline: whether it brought one.
            request_id: its name.
        """
        self.completed(end, has_deadline=has_deadline)
        index, exemplar = self._seq_buckets.index(prompt_tokens), _exemplar(request_id)
        self._request_duration[index].observe(seconds, exemplar)
        self._prompt_lengths.observe(prompt_tokens)
        self._output_lengths.observe(output_tokens)
        if first_token_seconds is not None and output_tokens > 1:
            mean = (seconds - first_token_seconds) / (output_tokens - 1)
            self._time_per_output_token[index].observe(mean, exemplar)
            self._slo["inter_token"][index][mean > self._objectives.inter_token].inc()

    def encoded(self, num_tokens: int, seconds: float) -> None:
        """A text or an image got its answer, so long after its call arrived."""
        self._request_duration[self._seq_buckets.index(num_tokens)].observe(seconds)
        self._prompt_lengths.observe(num_tokens)
        self._prompt_tokens.inc(num_tokens)

    def completed(self, end: End = "complete", *, has_deadline: bool = False) -> None:
        """An accepted request ended well; `has_deadline` says that it had to by a certain time."""
        self._finished[end].inc()
        if has_deadline:
            self._deadline_met.inc()

    def failed(self, end: End) -> None:
        """An accepted request ended otherwise."""
        self._finished[end].inc()
        if end == "deadline":
            self._deadline_missed.inc()

    # The engine

    def step(self, phase: Phase, rows: int, real_tokens: int, padding_tokens: int, seconds: float) -> None:
        """The graph ran once over `rows` sequences."""
        self._step[phase].observe(seconds)
        self._batch_size[phase].observe(rows)
        self._real_tokens[phase].inc(real_tokens)
        self._padding_tokens[phase].inc(padding_tokens)

    def queue(self, waiting: int, running: int, tokens: int = 0, predicted_seconds: float = 0.0) -> None:
        """Who is here now: requests, prompt tokens to compute, and how long one more would wait for it."""
        self._waiting.set(waiting)
        self._running.set(running)
        self._queue_tokens.set(tokens)
        self._predicted_queue.set(predicted_seconds)

    def memory(self, reserved: int, committed: int) -> None:
        """What is held of the KV budget: tokens reserved by requests, and these and what finished ones left."""
        self._kv_usage.set(reserved / self._kv_total if self._kv_total else 0.0)
        self._kv_used.set(reserved)
        self._kv_cached.set(committed - reserved)
        self._kv_free.set(self._kv_total - committed)

    def memory_is(self, total_tokens: int, block_tokens: int, num_slots: int) -> None:
        """Say how large the KV budget is and how it is cut."""
        self._kv_total = total_tokens
        self._kv_capacity.set(total_tokens)
        labels = (self._model, str(block_tokens), str(total_tokens // block_tokens), str(num_slots))
        self._families.kv_config.labels(*labels).set(1)
        self.memory(0, 0)

    def evicted(self, num_slots: int) -> None:
        """So many slots lost what they held of earlier requests."""
        self._prefix_evictions.inc(num_slots)

    def latency(self, latency: LatencyModel) -> None:
        """Show what this model learns, whenever somebody looks; what is not known is NaN."""
        for phase, coefficients in self._latency_coefficients.items():
            for index, coefficient in enumerate(coefficients):
                coefficient.set_function(partial(_coefficient, latency, phase, index))
            self._latency_error[phase].set_function(partial(_error, latency, phase))
            self._latency_observations[phase].set_function(partial(latency.observations, phase))

    def replayed(self, result: Result) -> None:
        """The canary has come to a verdict."""
        self._replays[result].inc()

    # Its life

    def loaded(
        self, seconds: float, *, sha256: str, family: str, precision: str, target: str, timestamp: float = 0.0
    ) -> None:
        """The model is served from now on, which is `timestamp` in Unix time."""
        name, _, version = self._model.partition("/")
        self._families.model_info.labels(self._model, name, version, sha256, family, precision, target).set(1)
        self._load_seconds.set(seconds)
        self._loaded_timestamp.set(timestamp)
        self._ready.set(1)

    def serving(self, healthy: bool) -> None:
        """The model can be called now, or cannot."""
        self._ready.set(healthy)


_OUTCOMES = ((False, "within"), (True, "over"))


def _exemplar(request_id: str) -> dict[str, str] | None:
    return {"request_id": request_id[:_MAX_EXEMPLAR]} if request_id else None


def _coefficient(latency: LatencyModel, phase: Phase, index: int) -> float:
    coefficients = latency.coefficients(phase)
    return nan if coefficients is None else coefficients[index]


def _error(latency: LatencyModel, phase: Phase) -> float:
    error = latency.error(phase)
    return nan if error is None else error
