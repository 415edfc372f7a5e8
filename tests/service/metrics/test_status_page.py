"""The status page as a browser shows it: the right figures in the right places, and nothing from elsewhere."""

import math
import random
import re
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from attendant.telemetry import METRICS
from service.metrics import MetricsEndpoint, ModelState, ServerMetrics
from service.metrics.plot import plot
from service.metrics.status_page import render_status
from service.scheduling.latency import LatencyModel
from service.scheduling.work import decode_work, prefill_work

MODEL = "tiny/1"
EVIL = '<script>alert(1)</script>"&'
PREFILL, DECODE = (2e-3, 1e-4, 2e-8), (5e-3, 1e-3, 3e-6)


class Page(HTMLParser):
    """The elements of a page in order: tag, attributes, and the text directly inside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data

    def all(self, tag, **attributes):
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def words(self, *tags):
        pairs = zip(self.elements, self.texts, strict=True)
        return [text.strip() for (tag, _), text in pairs if tag in tags]


@pytest.fixture
def metrics() -> ServerMetrics:
    """A model with known latencies at 100 and 3,000 tokens, and laws that were learned from noiseless runs."""
    metrics = ServerMetrics()
    model = metrics.model(MODEL, longest=8192)
    model.loaded(1.0, sha256="00" * 32, family="decoder", precision="fp32", target="cpu")
    rng = random.Random(1)
    latency = LatencyModel()
    for _ in range(64):
        length, rows = rng.randrange(2, 4000), rng.randrange(1, 9)
        for phase, work, law in (
            ("prefill", prefill_work(0, length), PREFILL),
            ("decode", decode_work([length] * rows), DECODE),
        ):
            latency.observe(phase, work, sum(map(math.prod, zip(law, work, strict=True))))
    model.latency(latency)
    for length, seconds in ((100, 0.03), (3000, 0.7)):
        for index in range(100):
            model.first_token(length, seconds * (1 + index / 100))
    model.inter_token(100, 1e6)
    model.queue(waiting=4, running=7, predicted_seconds=1.5)
    metrics.turned_away(MODEL, "queue_full")
    return metrics


@pytest.fixture
def endpoint(metrics: ServerMetrics) -> Iterator[MetricsEndpoint]:
    states = (
        ModelState(model=MODEL, state="ready"),
        ModelState(model="next/1", state="loading"),
        ModelState(model="broken/1", state="unavailable", reason=EVIL),
    )
    endpoint = MetricsEndpoint(
        metrics, host="127.0.0.1", port=0, alive=lambda: True, ready=lambda: True, models=lambda: states
    )
    yield endpoint
    endpoint.close()


def read_plot(page: Page, index: int) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Return the height of each quantile's line and the points of the curve of a plot, as seconds and tokens.

    They are read off the pixels with nothing but the ends of the axes, as an eye does.
    """
    begins = [i for i, (tag, _) in enumerate(page.elements) if tag == "svg"]
    ends = [*begins[1:], len(page.elements)]
    svg, *inside = page.elements[begins[index] : ends[index]]
    grid = [found for tag, found in inside if found.get("class") == "grid"]
    xs = sorted({float(line[x]) for line in grid for x in ("x1", "x2")})
    ys = sorted({float(line[y]) for line in grid for y in ("y1", "y2")})
    low_x, high_x, low_y, high_y = (
        float(svg[1][f"data-{end}-{unit}"]) for unit in ("tokens", "seconds") for end in ("low", "high")
    )

    def seconds(y: float) -> float:
        return low_y * (high_y / low_y) ** ((ys[-1] - y) / (ys[-1] - ys[0]))

    def tokens(x: float) -> float:
        return low_x * (high_x / low_x) ** ((x - xs[0]) / (xs[-1] - xs[0]))

    lines = {}
    for tag, found in inside:
        if tag == "g":
            bucket = found["data-tokens"]
        if tag == "line" and found["class"] in ("p50", "p95"):
            lines[f"{bucket} {found['class']}"] = seconds(float(found["y1"]))
    points = next((found["points"].split() for tag, found in inside if tag == "polyline"), [])
    pairs = (tuple(map(float, point.split(","))) for point in points)
    return lines, [(tokens(x), seconds(y)) for x, y in pairs]


def test_a_browser_shows_the_measured_quantiles_and_the_learned_costs_where_they_belong(endpoint, visit) -> None:
    done = visit(f"http://127.0.0.1:{endpoint.port}/", "--dump-dom")
    assert done.console == []
    assert [url for url in done.requests if not url.startswith("data:")] == []
    page = Page(done.output.decode())
    assert [section["data-latency"] for section in page.all("section")] == ["first token", "between tokens"]
    lines, curve = read_plot(page, 0)
    assert set(lines) == {"<= 128 p50", "<= 128 p95", "<= 4096 p50", "<= 4096 p95"}
    for bucket, seconds in (("<= 128", 0.03), ("<= 4096", 0.7)):
        for quantile, share in (("p50", 0.5), ("p95", 0.95)):
            true = seconds * (1 + share)
            assert true / 2 <= lines[f"{bucket} {quantile}"] <= 2 * true  # bounds of time double
    shown = [float(line["data-seconds"]) for line in page.all("line") if "data-seconds" in line]
    assert list(lines.values()) == pytest.approx(shown[:4], rel=0.01)
    assert len(curve) > 30
    for tokens, seconds in curve:
        constant, linear, quadratic = PREFILL
        assert seconds == pytest.approx(constant + linear * tokens + quadratic * tokens**2 / 2, rel=0.06), tokens
    lines, curve = read_plot(page, 1)
    assert set(lines) == {"<= 128 p50", "<= 128 p95"}
    assert max(lines.values()) == pytest.approx(1.6384, rel=0.01)  # the last bound: nothing is known beyond it
    for tokens, seconds in curve:
        assert seconds == pytest.approx(DECODE[0] + DECODE[1] + DECODE[2] * tokens, rel=0.06), tokens
    rows = page.words("td", "th")
    assert rows[rows.index("<= 128") : rows.index("<= 128") + 2] == ["<= 128", "100"]
    assert "> 1.64 s" in rows
    start = rows.index(MODEL)
    assert rows[start : start + 5] == [MODEL, "ready", "7", "4", "1.5 s"]
    assert rows[rows.index("prefill") : rows.index("prefill") + 4] == ["prefill", "2 ms", "100 us", "20 ns"]


@pytest.mark.slow
def test_a_browser_draws_the_page_light_and_dark(endpoint, visit, tmp_path) -> None:
    from PIL import Image

    for scheme, paper in ((1, (255, 255, 255)), (0, (0x1C, 0x1C, 0x21))):
        path = tmp_path / f"{scheme}.png"
        url = f"http://127.0.0.1:{endpoint.port}/status"
        visit(url, f"--screenshot={path}", f"--blink-settings=preferredColorScheme={scheme}")
        image = Image.open(path).convert("RGB")
        count, colour = max(image.getcolors(image.width * image.height))
        assert colour == paper and count > 0.5 * image.width * image.height


def test_whatever_a_bundle_says_is_text(endpoint) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/status", timeout=5) as response:
        text = response.read().decode()
        policy = response.headers["Content-Security-Policy"]
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert (response.headers["X-Content-Type-Options"], response.headers["Cache-Control"]) == (
            "nosniff",
            "no-store",
        )
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    page = Page(text)
    assert page.all("script") == [] and not re.search(r"https?:|url\(|@import| on\w+=", text)
    assert EVIL in page.words("td")
    assert "loading" in page.words("td")
    assert page.all("meta", **{"http-equiv": "refresh"}) == []
    with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/status?reload", timeout=5) as response:
        assert Page(response.read().decode()).all("meta", **{"http-equiv": "refresh"}) == [
            {"http-equiv": "refresh", "content": "10"}
        ]


def test_a_server_without_models_or_requests_still_has_a_page() -> None:
    metrics = ServerMetrics()
    assert "<h1>Attendant</h1>" in render_status(metrics.registry, ())
    metrics.model(MODEL, longest=8)
    page = Page(render_status(metrics.registry, [ModelState(model=MODEL, state="loading")]))
    assert page.all("svg") == [] and MODEL in page.words("th")


def test_nothing_measured_is_no_plot_and_one_range_of_lengths_is_one() -> None:
    metrics = ServerMetrics(seq_buckets=(64,))
    assert plot("request", {}, {}) is None
    model = metrics.model("image/1", longest=10, task="classify")
    model.encoded(10, 0.01)
    page = Page(render_status(metrics.registry, [ModelState(model="image/1", state="ready")]))
    lines, curve = read_plot(page, 0)
    assert set(lines) == {"> 0 p50", "> 0 p95"} and curve == []


def test_the_catalogue_has_every_metric_that_views_look_at(metrics: ServerMetrics) -> None:
    names = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    assert set(METRICS) <= names


@pytest.mark.slow
def test_a_complaint_of_the_browser_would_have_been_seen(visit, tmp_path) -> None:
    """The check of the console has teeth: a style that the policy of a page forbids."""
    page = tmp_path / "page.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    page.write_text(f"<!doctype html><html><head>{policy}<style>p {{ color: red }}</style></head><body></body></html>")
    assert "Content Security Policy" in " ".join(visit(page.as_uri(), "--dump-dom").console)
