"""The metrics of one RPC, under the names that gRPC servers of any language use.

They count what reaches the wire, for dashboards that are there already; `requests_total` counts the same calls by model
and task.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.metrics.catalogue import Catalogue


class MethodMetrics:
    """What is measured of one RPC; made by `ServerMetrics.method`.

    Args:
        families: where the children live.
        labels: its type, service and name.
    """

    def __init__(self, families: "Catalogue", labels: tuple[str, str, str]) -> None:
        self._started = families.calls_started.labels(*labels)
        self._sent = families.messages_sent.labels(*labels)
        self._handling = families.calls_handling.labels(*labels)
        self._handled = families.calls_handled
        self._labels = labels
        self._handled.labels(*labels, "OK")

    def started(self) -> None:
        """A call came in."""
        self._started.inc()

    def sent(self) -> None:
        """A message of the answer is on its way."""
        self._sent.inc()

    def ended(self, code: str, seconds: float) -> None:
        """A call ended with this gRPC code, so long after it came."""
        self._handled.labels(*self._labels, code).inc()
        self._handling.observe(seconds)
