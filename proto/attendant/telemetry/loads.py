"""The load of every model, and its latencies by sequence length, gathered from samples."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import nan

from attendant.telemetry.cost import Law
from attendant.telemetry.histogram import Histogram
from attendant.telemetry.samples import Sample

LATENCIES = {
    "first token": "attendant_time_to_first_token_seconds",
    "between tokens": "attendant_inter_token_latency_seconds",
    "request": "attendant_request_duration_seconds",
}
"""The histograms by sequence length, by what they measure."""

METRICS = (
    *(f"{name}_bucket" for name in LATENCIES.values()),
    "attendant_batch_size_count",
    "attendant_batch_size_sum",
    "attendant_batch_tokens_total",
    "attendant_deadline_requests_total",
    "attendant_kv_cache_usage_ratio",
    "attendant_latency_model_coefficient",
    "attendant_latency_model_error_ratio",
    "attendant_latency_model_observations",
    "attendant_model_ready",
    "attendant_predicted_queue_seconds",
    "attendant_requests_rejected_total",
    "attendant_requests_running",
    "attendant_requests_total",
    "attendant_requests_waiting",
    "attendant_tokens_total",
)
"""The names of all samples that a `Load` looks at."""

UNKNOWN_MODEL = "_unknown"
"""Under this name servers count calls that name no model of theirs."""

_PHASES = ("encode", "prefill", "decode")


@dataclass(frozen=True)
class Load:
    """What one model does, from its own samples; counts and times cover what the samples cover.

    Args:
        model: "name/version".
        samples: of this model, by name.
    """

    model: str
    samples: Mapping[str, list[Sample]] = field(repr=False)

    @property
    def is_ready(self) -> bool:
        """Whether it can be called."""
        return self._sum("attendant_model_ready") > 0

    @property
    def running(self) -> int:
        """Requests that are computed now."""
        return int(self._sum("attendant_requests_running"))

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return int(self._sum("attendant_requests_waiting"))

    @property
    def predicted_queue_seconds(self) -> float:
        """How long a request that came now would wait, as the server predicts."""
        return self._sum("attendant_predicted_queue_seconds")

    @property
    def kv_usage(self) -> float:
        """Share of the KV token budget that is reserved now."""
        return self._sum("attendant_kv_cache_usage_ratio")

    @property
    def answered(self) -> int:
        """Calls that ended well."""
        return int(self._sum("attendant_requests_total", code="OK"))

    @property
    def refused(self) -> int:
        """Requests that were turned away at the door."""
        return int(self._sum("attendant_requests_rejected_total"))

    @property
    def missed(self) -> int:
        """Accepted requests that their deadline ended."""
        return int(self._sum("attendant_deadline_requests_total", outcome="missed"))

    def is_called(self, name: str | None) -> bool:
        """Whether this is the model of that name, "name" or "name/version"; None names every model."""
        return name is None or name in (self.model, self.model.rpartition("/")[0])

    def tokens(self, kind: str) -> float:
        """Return how many tokens of a kind there were: prompt, prompt_cached or output."""
        return self._sum("attendant_tokens_total", kind=kind)

    @property
    def cached_share(self) -> float:
        """Share of the prompts' tokens that another prompt had left behind; NaN without prompts."""
        return _share(self.tokens("prompt_cached"), self.tokens("prompt"))

    @property
    def padding_share(self) -> float:
        """Share of what went through the graphs that was padding; NaN if nothing did."""
        name = "attendant_batch_tokens_total"
        return _share(self._sum(name, kind="padding"), self._sum(name, kind="real"))

    @property
    def batch(self) -> float:
        """Mean number of sequences of a run of the phase that most runs were of; NaN without runs."""
        runs = {phase: self._sum("attendant_batch_size_count", phase=phase) for phase in _PHASES}
        phase = max(runs, key=lambda phase: runs[phase])
        return self._sum("attendant_batch_size_sum", phase=phase) / runs[phase] if runs[phase] else nan

    @cached_property
    def latencies(self) -> dict[str, dict[float, Histogram]]:
        """The histograms of each of `LATENCIES`, by upper bound of the length in tokens."""
        found: dict[str, dict[float, Histogram]] = {}
        for latency, name in LATENCIES.items():
            found[latency] = defaultdict(Histogram)
            for sample in self.samples.get(f"{name}_bucket", ()):
                histogram = found[latency][float(sample.labels["seq_bucket"])]
                histogram.counts[float(sample.labels["le"])] += sample.value
        return found

    @cached_property
    def laws(self) -> dict[str, Law]:
        """What each phase was learned to cost, of the phases of which enough is known."""
        terms: dict[str, dict[str, float]] = defaultdict(dict)
        for sample in self.samples.get("attendant_latency_model_coefficient", ()):
            terms[sample.labels["phase"]][sample.labels["term"]] = sample.value
        laws = {phase: Law(*(by_term.get(term, nan) for term in Law._fields)) for phase, by_term in terms.items()}
        return {phase: laws[phase] for phase in _PHASES if phase in laws and laws[phase].is_known}

    def law_error(self, phase: str) -> float:
        """Return the median relative error of the phase's predictions; NaN before there are any."""
        return self._sum("attendant_latency_model_error_ratio", phase=phase)

    def law_observations(self, phase: str) -> int:
        """Return how many runs the phase's law was learned from."""
        return int(self._sum("attendant_latency_model_observations", phase=phase))

    def _matching(self, name: str, **labels: str) -> Iterable[Sample]:
        return (sample for sample in self.samples.get(name, ()) if labels.items() <= sample.labels.items())

    def _sum(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self._matching(name, **labels))


def loads(samples: Iterable[Sample]) -> list[Load]:
    """Return the load of every model that the samples name, by name."""
    by_model: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        model = sample.labels.get("model")
        if model is not None:
            by_model[model][sample.name].append(sample)
    return [Load(model, found) for model, found in sorted(by_model.items()) if model != UNKNOWN_MODEL]


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest else nan
