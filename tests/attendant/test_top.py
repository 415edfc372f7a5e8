"""`attendant top`: what it shows is what the server counted, at any width, and it outlives the server."""

import fcntl
import itertools
import re
import struct
import termios
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from attendant import cli
from attendant._top import frame
from attendant.telemetry import LATENCIES, METRICS, Load, Sample, loads

PATIENCE = 20  # seconds
A, B = "alpha/1", "beta/2"


class Server:
    """Metrics as a server of two models shows them, on a port of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.port = 0
        make = {"registry": self.registry}
        names = {latency: (name, name, ["model", "seq_bucket"]) for latency, name in LATENCIES.items()}
        self.latency = {latency: Histogram(*name, buckets=(0.1, 0.2, 0.4), **make) for latency, name in names.items()}
        self.batch = Histogram("attendant_batch_size", "x", ["model", "phase"], buckets=(1, 2, 4), **make)
        self.padding = Counter("attendant_batch_tokens_total", "x", ["model", "phase", "kind"], **make)
        self.tokens = Counter("attendant_tokens_total", "x", ["model", "kind"], **make)
        self.deadlines = Counter("attendant_deadline_requests_total", "x", ["model", "outcome"], **make)
        self.rejected = Counter("attendant_requests_rejected_total", "x", ["model", "reason"], **make)
        self.gauges = {
            name: Gauge(f"attendant_{name}", "x", ["model"], **make)
            for name in (
                "model_ready",
                "requests_running",
                "requests_waiting",
                "kv_cache_usage_ratio",
                "predicted_queue_seconds",
            )
        }
        for model in (A, B):
            self.gauges["model_ready"].labels(model).set(model == A)

    def work(self) -> None:
        """What one interval brings to the first model."""
        for seconds in (0.05, 0.15, 0.15, 0.15):
            self.latency["first token"].labels(A, "64").observe(seconds)
        self.latency["between tokens"].labels(A, "+Inf").observe(9.0)
        self.latency["request"].labels(A, "64").observe(0.3)
        for rows in (3, 4):
            self.batch.labels(A, "decode").observe(rows)
        self.batch.labels(A, "prefill").observe(1)
        self.padding.labels(A, "decode", "real").inc(7)
        self.padding.labels(A, "decode", "padding").inc(1)
        self.tokens.labels(A, "output").inc(600)
        self.tokens.labels(A, "prompt").inc(30)
        self.tokens.labels(A, "prompt_cached").inc(10)
        self.deadlines.labels(A, "missed").inc(2)
        self.deadlines.labels(A, "met").inc(5)
        self.rejected.labels(A, "queue_full").inc(3)
        self.gauges["requests_running"].labels(A).set(2)
        self.gauges["requests_waiting"].labels(A).set(1)
        self.gauges["kv_cache_usage_ratio"].labels(A).set(0.125)
        self.gauges["predicted_queue_seconds"].labels(A).set(0.25)

    def loads(self) -> list[Load]:
        return loads(Sample(s.name, s.labels, s.value) for family in self.registry.collect() for s in family.samples)

    def open(self) -> None:
        self.http, self.thread = start_http_server(self.port, "127.0.0.1", self.registry)
        self.port = self.http.server_port

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """Whatever terminal the tests themselves run in."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.open()
    yield server
    server.close()


def cells(lines: list[str]) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in lines]


def test_a_frame_says_what_was_counted() -> None:
    server = Server()
    server.work()
    lines = cells(frame(server.loads(), 2.0, width=200))
    header, alpha, beta = lines[:3]
    assert dict(zip(header, alpha, strict=True)) == {
        "MODEL": A,
        "STATE": "ready",
        "RUN": "2",
        "WAIT": "1",
        "QUEUE": "250 ms",
        "TOKENS/S": "300",
        "BATCH": "3.5",
        "PADDING": "12.5%",
        "KV": "12.5%",
        "CACHED": "25.0%",
        "REFUSED": "3",
        "MISSED": "2",
    }
    assert beta == [B, "not ready", "0", "0", "0 s", "0", "-", "-", "0.0%", "-", "0", "0"]
    assert lines[3:] == [
        [""],
        [A],
        ["TOKENS", "REQUESTS", "FIRST P50", "FIRST P95", "GAP P50", "GAP P95", "REQUEST P50", "REQUEST P95"],
        ["<= 64", "1", "133 ms", "193 ms", "-", "-", "300 ms", "390 ms"],
        ["> 64", "0", "-", "-", "> 400 ms", "> 400 ms", "-", "-"],
    ]


def test_no_line_is_wider_than_the_terminal_and_no_figure_is_lost() -> None:
    server = Server()
    server.work()
    wide = cells(frame(server.loads(), 2.0, width=200))
    figures = {figure for line in wide for figure in line}
    for width in range(20, 201):
        lines = frame(server.loads(), 2.0, width=width)
        assert max(map(len, lines)) <= width
        if width >= 40:
            assert figures == {figure for line in cells(lines) for figure in line}, width
    assert all(a <= b for a, b in itertools.pairwise(len(frame(server.loads(), 2.0, width=w)) for w in (200, 80, 40)))


def test_a_name_cannot_steer_the_terminal_nor_push_the_figures_out() -> None:
    samples = [Sample("attendant_model_ready", {"model": "\x1b[2J" + "x" * 100}, 1.0)]
    lines = frame(loads(samples), None, width=40)
    assert "\x1b" not in "".join(lines)
    assert cells(lines)[1] == ["\\x1b[2J" + "x" * 12 + "~", "ready", "0", "0"]


def test_a_load_looks_at_the_samples_that_it_says() -> None:
    class Asked(dict[str, list[Sample]]):
        def get(self, name, default=()):
            asked.add(name)
            return [Sample(name, {"phase": "decode", "term": "linear", "seq_bucket": "64", "le": "1.0"}, 1.0)]

    asked: set[str] = set()
    load = Load(A, Asked())
    for name in dir(Load):
        if not name.startswith("_") and name not in ("model", "samples"):
            value = getattr(load, name)
            if callable(value) and name != "is_called":
                value("x")
    assert asked == set(METRICS)


def test_once_shows_everything_since_the_start_or_what_the_next_seconds_bring(server, capsys) -> None:
    server.work()
    assert cli.main(["top", "--once", "--metrics", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{server.url}: since the server started"
    assert cells(lines)[3][5:7] == ["-", "3.5"]  # nobody knows when that was, so there is no rate
    assert cli.main(["top", "--once", "--every", "0.01", "--model", "alpha", "--metrics", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(re.escape(server.url) + r": the last [\d.]+ ms", lines[0])
    assert cells(lines)[3:] == [[A, "ready", "2", "1", "250 ms", "0", "-", "-", "12.5%", "-", "0", "0"]]
    assert cli.main(["top", "--once", "--model", "gamma", "--metrics", server.url]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["The server has no such model."]


def test_rates_since_the_start_are_by_the_clock_of_the_server(server, capsys) -> None:
    """A client whose clock is hours away would see another."""
    server.work()
    Gauge("process_start_time_seconds", "x", registry=server.registry).set(0)
    cli.main(["top", "--once", "--metrics", server.url])
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"since the server started, \d{6} h ago", lines[0])  # in 1970
    assert cells(lines)[3][5] == "0"


def test_once_without_a_server_fails_and_says_why(run, server, free_port, capsys) -> None:
    done = run("top", "--once", "--metrics", f"http://127.0.0.1:{free_port}/metrics")
    assert done.returncode == 1 and re.fullmatch(r"attendant: cannot read .*refused\n", done.stderr)
    server.registry = CollectorRegistry()
    server.close()
    server.open()
    assert cli.main(["top", "--once", "--metrics", server.url]) == 1
    assert "shows no metrics of Attendant" in capsys.readouterr().err
    for wrong in ("0", "-1", "inf", "nan", "soon"):
        with pytest.raises(SystemExit) as refused:
            cli.main(["top", "--every", wrong])
        assert refused.value.code == 2


def test_it_goes_on_without_the_server_until_ctrl_c(server, on_terminal, terminal, environment) -> None:
    environment.pop("COLUMNS", None)
    fcntl.ioctl(terminal.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    server.work()
    process = on_terminal("top", "--metrics", server.url, "--every", "0.1")
    terminal.wait_for(r"\x1b\[\?1049h.*since the server started")
    terminal.wait_for("the last ")
    server.close()
    terminal.wait_for("refused; last answer")
    server.open()
    shown = terminal.wait_for(r"\x1b\[H[^\x1b]*the last [^J]*\x1b\[J")
    lines = re.sub(r"\x1b\[\w", "", shown).split("\r\n")
    assert len(lines) <= 12 and max(map(len, lines)) <= 60
    terminal.type("\x03")
    terminal.wait_for(r"\x1b\[\?25h\x1b\[\?1049l")
    assert process.wait(PATIENCE) == 0


def test_into_a_pipe_frames_follow_each_other_and_a_reader_may_leave(server, start) -> None:
    process = start("top", "--metrics", server.url, "--every", "0.01")
    lines = iter(process.stdout.readline, b"")
    titles = [line for line in itertools.islice(lines, 20) if line.startswith(b"http")]
    assert len(titles) >= 3 and b"\x1b" not in b"".join(titles)
    process.stdout.close()
    assert process.wait(PATIENCE) == 141
