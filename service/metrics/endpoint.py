"""The HTTP port: /metrics for Prometheus, /healthz and /readyz for whoever does not speak gRPC, / for people.

It runs in threads of its own, because rendering takes milliseconds that the event loop does not have.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import ThreadingHTTPServer
from socketserver import TCPServer

from prometheus_client.exposition import MetricsHandler

from service.metrics.server import ServerMetrics
from service.metrics.status_page import POLICY, ModelState, render_status

_log = logging.getLogger(__name__)

Probe = Callable[[], bool]
Models = Callable[[], Sequence[ModelState]]

_TEXT, _HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"
_NO_HEADERS: Mapping[str, str] = {}
_PAGE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up of the host's name, which can take seconds."""
        TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Log what the library would print: mostly clients that went away."""
        _log.debug("HTTP request from %s failed", client_address, exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class MetricsEndpoint:
    """Listens from construction until `close`.

    Args:
        metrics: what /metrics shows.
        host: address to listen on.
        port: TCP port; 0 takes a free one, see `port`.
        alive: whether /healthz answers 200; called from other threads.
        ready: the same for /readyz.
        models: what the page at / and /status lists; called from other threads.

    Raises:
        OSError: the port cannot be taken.
    """

    def __init__(
        self, metrics: ServerMetrics, *, host: str, port: int, alive: Probe, ready: Probe, models: Models = tuple
    ) -> None:
        probes = {"/healthz": alive, "/readyz": ready}
        server = _Server6 if ":" in host else _Server
        self._server = server((host, port), _handler(metrics, probes, models))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; returns within half a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(metrics: ServerMetrics, probes: dict[str, Probe], models: Models) -> type[MetricsHandler]:
    class Handler(MetricsHandler):
        registry = metrics.registry
        timeout = 10.0  # seconds that a silent connection may hold a thread

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/metrics":
                started = time.perf_counter()
                super().do_GET()
                metrics.scrape_seconds.set(time.perf_counter() - started)
            elif path in ("/", "/status"):
                page = render_status(metrics.registry, models(), reloads=query == "reload")
                self._answer(200, page, _HTML, _PAGE_HEADERS)
            elif (probe := probes.get(path)) is not None:
                self._answer(200, "ok\n") if probe() else self._answer(503, "not now\n")
            else:
                self._answer(404, "known: / /metrics /healthz /readyz\n")

        def _answer(
            self, status: int, text: str, content_type: str = _TEXT, headers: Mapping[str, str] = _NO_HEADERS
        ) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
