"""What the service measures, and the HTTP endpoint that Prometheus scrapes.

docs/metrics.md is the catalogue for people. Nothing here is global: whoever starts a service makes one
`ServerMetrics`, and several may live in one process.
"""

from service.metrics.buckets import Objectives
from service.metrics.calls import MethodMetrics
from service.metrics.endpoint import MetricsEndpoint
from service.metrics.model import ModelMetrics, Task
from service.metrics.server import ServerMetrics
from service.metrics.status_page import ModelState

__all__ = ["MethodMetrics", "MetricsEndpoint", "ModelMetrics", "ModelState", "Objectives", "ServerMetrics", "Task"]
