"""Two servers are replaced one after the other while requests run: through an L7 proxy and by client-side balancing."""

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from attendant import Client

PATIENCE = 60.0  # seconds
ROUTES = {"proxy": "tiny-fp32", "client": "tiny-int8"}  # a model for each: the metrics tell who came which way
LENGTHS = (8, 40, 240)  # tokens; the longest run across the signal
# A server that is told to leave says so first, and takes requests for as long as word of it travels.
DRAINING = ("--drain-delay-seconds", "0.5", "--max-connection-age-seconds", "2")
NGINX = """
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log warn;
events {{ worker_connections 512; }}
http {{
    access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
    upstream attendant {{ {servers} }}
    server {{
        listen 127.0.0.1:{port} http2;
        location / {{ grpc_pass grpc://attendant; grpc_read_timeout 1h; grpc_next_upstream error timeout; }}
    }}
}}
"""


class Load:
    """Streams that begin anew as soon as they end, over one route, until told to stop."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self.model = model
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self.finished = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(length,)) for length in LENGTHS]
        for thread in self._threads:
            thread.start()

    def _run(self, length: int) -> None:
        while not self._stopping.is_set():
            failure = None
            try:
                answer = self._client.generate(
                    token_ids=[5, 6], model=self.model, max_tokens=length, ignore_eos=True, timeout=PATIENCE
                ).result()
                if answer.usage.output_tokens != length:
                    failure = f"{answer.usage.output_tokens} tokens instead of {length}"
            except Exception as error:
                failure = repr(error)
            with self._changed:
                self.failures += [failure] if failure else []
                self.finished += 1
                self._changed.notify_all()

    def wait_for(self, more: int) -> None:
        """Wait until so many more streams have ended."""
        with self._changed:
            goal = self.finished + more
            assert self._changed.wait_for(lambda: self.finished >= goal, PATIENCE), "the load stands still"

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator:
    """Start nginx before servers."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(program).exists():
        pytest.skip("nginx is not installed: no rolling update behind a proxy (apt-get install nginx-light)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: list[subprocess.Popen[bytes]] = []

    def start(ports: list[int]) -> str:
        servers = " ".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in ports)
        config = tmp_path / "nginx.conf"
        config.write_text(NGINX.format(directory=tmp_path, port=port, servers=servers))
        running.append(subprocess.Popen([program, "-c", str(config), "-e", str(tmp_path / "error.log")]))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = health_pb2.HealthCheckRequest(service="readiness")
            health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE, wait_for_ready=True)
        return f"127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.slow
def test_a_rolling_update_fails_no_request_behind_a_proxy_or_by_client_side_balancing(start, proxy) -> None:
    servers = [start(*DRAINING) for _ in range(2)]
    ports = [server.port for server in servers]
    for server in servers:
        server.wait_ready()
    everywhere = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    with Client(proxy(ports)) as behind, Client(everywhere, check_health="readiness") as balancing:
        loads = {"proxy": Load(behind, ROUTES["proxy"]), "client": Load(balancing, ROUTES["client"])}
        try:
            for index, port in enumerate(ports):
                for load in loads.values():
                    load.wait_for(len(LENGTHS))
                servers[index].signal()
                assert servers[index].wait() == 0
                for load in loads.values():
                    load.wait_for(len(LENGTHS))  # the other one carries everything
                servers[index] = start(*DRAINING, "--port", str(port)).wait_ready()
                for load in loads.values():  # `minReadySeconds`: the next one goes when this one has been found
                    while not servers[index].value("attendant_requests_total", model=f"{load.model}/1"):
                        load.wait_for(1)
        finally:
            for load in loads.values():
                load.stop()
    assert {route: load.failures for route, load in loads.items()} == {route: [] for route in ROUTES}
    assert all(load.finished > 30 for load in loads.values())


def test_client_side_balancing_leaves_a_server_that_says_it_drains_before_it_closes(start) -> None:
    leaving = start("--models", "tiny-fp32", "--drain-delay-seconds", "600").wait_ready()
    staying = start("--models", "tiny-fp32").wait_ready()
    target = f"ipv4:127.0.0.1:{leaving.port},127.0.0.1:{staying.port}"
    with Client(target, check_health="model/tiny-fp32") as client:
        while not (leaving.value("attendant_requests_total") and staying.value("attendant_requests_total")):
            client.generate(token_ids=[5, 6], model="tiny-fp32", max_tokens=1).result()
        watch = leaving.health.Watch(health_pb2.HealthCheckRequest(service="model/tiny-fp32"))
        next(watch)
        leaving.signal()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        served = -1.0
        while served < (served := leaving.value("attendant_requests_total")):  # until word of it has arrived
            for _ in range(4):
                client.generate(token_ids=[5, 6], model="tiny-fp32", max_tokens=1).result()
        assert leaving.process.poll() is None
        assert leaving.status_of("liveness") == "SERVING", "it still runs, and would still answer"
