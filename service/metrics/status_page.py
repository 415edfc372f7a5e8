"""The status page: models, their load, and latency by sequence length, as one page that needs nothing else.

Built from the registry when somebody asks, in the thread of the one who asks. It holds no script, asks for no font and
no picture, and its policy forbids all of them.
"""

from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from math import isfinite

from prometheus_client import CollectorRegistry

from attendant.telemetry import (
    LATENCIES,
    METRICS,
    Histogram,
    Load,
    Sample,
    duration,
    length_names,
    loads,
    percent,
    quantile_text,
)
from service.metrics.plot import QUANTILES, plot

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #18181b; --faint: #63636e; --line: #e0e0e5; --band: #dbe7fb;
  --p50: #1d4ed8; --p95: #c2570c; --fit: #3f3f46; --good: #15803d; --bad: #b91c1c }
@media (prefers-color-scheme: dark) { :root { --paper: #1c1c21; --text: #ececef; --faint: #a5a5b0; --line: #3a3a43;
  --band: #26375a; --p50: #7fb0ff; --p95: #f5a65b; --fit: #d4d4d8; --good: #4ade80; --bad: #f87171 } }
body { margin: 0 auto; padding: 1.5rem; max-width: 92rem; background: var(--paper); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere }
h3 { font-size: 1rem; margin: 0 0 .25rem; font-weight: 600 }
p { max-width: 62rem; margin: .5rem 0; color: var(--faint) }
a { color: var(--p50) }
.scroll { overflow-x: auto }
.plots { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.plots section { flex: 1 1 24rem; max-width: 36rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0 }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
th[scope=row], .text { text-align: left }
td.reason { white-space: normal; text-align: left; color: var(--bad); overflow-wrap: anywhere }
.ready { color: var(--good) }
.loading { color: var(--faint) }
.unavailable { color: var(--bad) }
svg { width: 100%; height: auto; display: block }
svg text { font-size: 11px; fill: var(--faint) }
.grid { stroke: var(--line) }
rect { fill: var(--band); opacity: .75 }
.p50, .p95 { stroke-width: 2.5 }
.p50 { stroke: var(--p50) }
.p95 { stroke: var(--p95) }
.fit { fill: none; stroke: var(--fit); stroke-width: 1.5; stroke-dasharray: 5 4 }
b.p50 { color: var(--p50) }
b.p95 { color: var(--p95) }
"""

POLICY = (
    f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser may do with the page: apply its own style, and nothing else."""

_RELOAD_SECONDS = 10
_LOAD = (
    *("state", "running", "waiting", "queue", "answered", "output tokens", "mean batch", "padding", "KV", "cached"),
    *("refused", "missed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What is known of one bundle of the repository; `reason` says why it is not served."""

    model: str
    state: str
    reason: str = ""


def render_status(registry: CollectorRegistry, models: Sequence[ModelState], *, reloads: bool = False) -> str:
    """Return the page.

    Args:
        registry: of the server's metrics.
        models: all bundles, those that are not served among them.
        reloads: whether a browser is to ask again by itself.
    """
    return "\n".join(_page(_loads(registry), models, reloads)) + "\n"


def _loads(registry: CollectorRegistry) -> dict[str, Load]:
    """Return the load of each model; only the metrics that a load looks at are collected."""
    families = registry.restricted_registry(METRICS).collect()
    samples = (Sample(sample.name, sample.labels, sample.value) for family in families for sample in family.samples)
    return {load.model: load for load in loads(samples)}


def _page(found: dict[str, Load], models: Sequence[ModelState], reloads: bool) -> Iterator[str]:
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    if reloads:
        yield f'<meta http-equiv="refresh" content="{_RELOAD_SECONDS}">'
    yield f"<title>Attendant</title><style>{_STYLE}</style></head><body><h1>Attendant</h1>"
    other = ("/status", "stop") if reloads else ("/status?reload", f"every {_RELOAD_SECONDS} seconds")
    yield f'<p>Counts and latencies since the server started. Reload: <a href="{other[0]}">{other[1]}</a>. '
    yield 'For Prometheus: <a href="/metrics">/metrics</a>.</p>'
    yield from _overview(found, models)
    yield "<main>"
    for state in models:
        if state.model in found:
            yield from _model(found[state.model])
    yield "</main></body></html>"


def _overview(found: dict[str, Load], models: Sequence[ModelState]) -> Iterator[str]:
    header = "".join(f'<th scope="col">{title}</th>' for title in _LOAD)
    yield '<div class="scroll"><table id="load"><thead><tr><th scope="col" class="text">model</th>'
    yield f"{header}</tr></thead>"
    for state in models:
        yield f'<tr><th scope="row">{escape(state.model)}</th><td class="{state.state}">{escape(state.state)}</td>'
        if state.reason:
            yield f'<td class="reason" colspan="{len(_LOAD) - 1}">{escape(state.reason)}</td></tr>'
        else:
            load = found.get(state.model)
            yield "".join(f"<td>{cell}</td>" for cell in _load_cells(load)) + "</tr>" if load else "</tr>"
    yield "</table></div>"


def _load_cells(load: Load) -> list[str]:
    return [
        str(load.running),
        str(load.waiting),
        duration(load.predicted_queue_seconds),
        str(load.answered),
        f"{load.tokens('output'):.0f}",
        f"{load.batch:.1f}" if isfinite(load.batch) else "-",
        percent(load.padding_share),
        percent(load.kv_usage),
        percent(load.cached_share),
        str(load.refused),
        str(load.missed),
    ]


def _model(load: Load) -> Iterator[str]:
    """The plots of a model with their figures, and what it has learned; nothing if nothing was measured."""
    plots = {latency: plot(latency, load.latencies[latency], load.laws) for latency in LATENCIES}
    drawn = {latency: svg for latency, svg in plots.items() if svg is not None}
    if not drawn and not load.laws:
        return
    name = escape(load.model)
    yield f'<article data-model="{name}"><h2>{name}</h2>'
    if drawn:
        yield (
            '<p>Over the length in tokens: <b class="p50">p50</b> and <b class="p95">p95</b> of what was measured, and '
            "(dashed) the fitted cost of computing alone, with no queue and no neighbours.</p>"
        )
    yield '<div class="plots">'
    for latency, svg in drawn.items():
        yield f'<section data-latency="{latency}"><h3>{latency}</h3>{svg}'
        yield from _figures(load.latencies[latency])
        yield "</section>"
    yield "</div>"
    yield from _laws(load)
    yield "</article>"


def _figures(histograms: dict[float, Histogram]) -> Iterator[str]:
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("count", *QUANTILES))
    yield f'<table><thead><tr><th scope="col" class="text">tokens</th>{titles}</tr></thead>'
    for bound, name in length_names(histograms).items():
        histogram = histograms[bound]
        if histogram.count:
            cells = "".join(f"<td>{escape(quantile_text(histogram, q))}</td>" for q in QUANTILES.values())
            yield f'<tr><th scope="row">{escape(name)}</th><td>{histogram.count}</td>{cells}</tr>'
    yield "</table>"


def _laws(load: Load) -> Iterator[str]:
    """What a length costs, as the latency model has learned it."""
    if not load.laws:
        return
    titles = ("each run", "each token", "each attended position", "median error", "runs learned from")
    header = "".join(f'<th scope="col">{title}</th>' for title in titles)
    yield f'<div class="scroll"><table><thead><tr><th scope="col" class="text">cost of</th>{header}</tr></thead>'
    for phase, law in load.laws.items():
        cells = [*map(duration, law), percent(load.law_error(phase)), str(load.law_observations(phase))]
        yield f'<tr><th scope="row">{phase}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    yield "</table></div>"
