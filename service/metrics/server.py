"""The metrics of a server: the catalogue, and a method for each thing that happens outside of any model.

Calls that name no model of the repository count under the model "_unknown", so no request can make a series.
"""

from collections.abc import Sequence

from prometheus_client import GCCollector, ProcessCollector

from service.metrics import buckets
from service.metrics.calls import MethodMetrics
from service.metrics.catalogue import Catalogue
from service.metrics.gpu import GpuCollector, find_gpus
from service.metrics.model import RESTARTS, ModelMetrics, Task

UNKNOWN_MODEL = "_unknown"


class ServerMetrics(Catalogue):
    """The families, the metrics of each model, and those of the process.

    Args:
        seq_buckets: bounds of the `seq_bucket` label, in tokens.
        objectives: that requests are counted by.
    """

    def __init__(
        self,
        seq_buckets: Sequence[int] = buckets.DEFAULT_SEQ_BUCKETS,
        objectives: buckets.Objectives | None = None,
    ) -> None:
        self.objectives = objectives or buckets.Objectives()
        super().__init__(self.objectives)
        self._seq_buckets = tuple(seq_buckets)
        self.slo_target.labels("first_token").set(self.objectives.first_token)
        self.slo_target.labels("inter_token").set(self.objectives.inter_token)
        self.lag = self.event_loop_lag.labels()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        if (gpus := find_gpus()) is not None:
            self.registry.register(GpuCollector(gpus))

    def model(self, model: str, longest: int, task: Task = "generate") -> ModelMetrics:
        """Return the metrics of one model.

        Args:
            model: "name/version".
            longest: its longest sequence, in tokens, that of its source included.
            task: what it is asked for.
        """
        seq_buckets = buckets.SeqBuckets(self._seq_buckets, longest)
        return ModelMetrics(self, model, seq_buckets, self.objectives, task)

    def method(self, service: str, method: str, *, streams: bool) -> MethodMetrics:
        """Return the metrics of one RPC; `streams` says that it is answered by many messages."""
        return MethodMetrics(self, ("server_stream" if streams else "unary", service, method))

    def refused_model(self, model: str) -> None:
        """Say that a bundle of the repository is not served."""
        self.ready.labels(model).set(0)

    def restarted(self, model: str, *, succeeded: bool) -> None:
        """Count that a model which had failed was loaded again, or could not be."""
        self.restarts.labels(model, RESTARTS[not succeeded]).inc()

    def answered(self, model: str | None, task: str, code: str) -> None:
        """Count a call that ended with this gRPC code; without a model of the repository both are "_unknown"."""
        labels = (UNKNOWN_MODEL, UNKNOWN_MODEL) if model is None else (model, task)
        self.requests.labels(*labels, code).inc()

    def turned_away(self, model: str | None, reason: str) -> None:
        """Count a request that was not accepted."""
        self.rejected.labels(model or UNKNOWN_MODEL, reason).inc()
        if reason.startswith("deadline"):
            self.deadline_requests.labels(model or UNKNOWN_MODEL, "refused").inc()
