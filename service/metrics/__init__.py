"""What the service measures, and the HTTP endpoint that Prometheus scrapes.

docs/metrics.md is the catalogue for people. Nothing here is global: whoever starts a service makes one
`ServerMetrics`, and several may live in one process.
"""

from service.metrics.catalogue import ServerMetrics
from service.metrics.endpoint import MetricsEndpoint
from service.metrics.model import ModelMetrics, Task

__all__ = ["MetricsEndpoint", "ModelMetrics", "ServerMetrics", "Task"]
