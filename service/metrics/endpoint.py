"""The HTTP port: /metrics for Prometheus, /healthz and /readyz for whoever does not speak gRPC, / for people.

It runs in threads of its own, because rendering takes milliseconds that the event loop does not have.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer

from service.metrics.rendering import render
from service.metrics.server import ServerMetrics
from service.metrics.status_page import POLICY, ModelState, render_status

_log = logging.getLogger(__name__)

Probe = Callable[[], bool]
Models = Callable[[], Sequence[ModelState]]

_PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
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


def _handler(metrics: ServerMetrics, probes: dict[str, Probe], models: Models) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # seconds that a silent connection may hold a thread

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if path == "/metrics":
                started = time.perf_counter()
                wanted = [self.headers.get(name, "") for name in ("Accept", "Accept-Encoding")]
                body, headers = render(metrics.registry, *wanted)
                metrics.scrape_seconds.set(time.perf_counter() - started)
                self._send(200, body, headers)
            elif path in ("/", "/status"):
                page = render_status(metrics.registry, models(), reloads=query == "reload")
                self._send(200, page.encode(), _PAGE_HEADERS)
            elif (probe := probes.get(path)) is not None:
                self._answer(200, "ok\n") if probe() else self._answer(503, "not now\n")
            else:
                self._answer(404, "known: / /metrics /healthz /readyz\n")

        def _answer(self, status: int, text: str) -> None:
            self._send(status, text.encode(), {"Content-Type": "text/plain; charset=utf-8"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: probes and scrapes come every few seconds."""

    return Handler
