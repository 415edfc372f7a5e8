"""Writes attendant.json, the Grafana dashboard: `python deploy/grafana/dashboard.py`.

A panel is a line here and sixty in JSON. Panels flow from left to right; a row of the dashboard has 24 columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("attendant.json")
COLUMNS, HEIGHT, ROW_HEIGHT, STAT_HEIGHT = 24, 8, 1, 4
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
ERROR_BUDGET = 0.01  # share of requests that may be over their objective, as in deploy/prometheus/alerts.yml

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SERVER = 'job=~"$job", instance=~"$instance"'
MODEL = f'{SERVER}, model=~"($model)/($version)"'
RULE = 'job=~"$job", model=~"($model)/($version)"'  # recorded over all instances
LATENCIES = {
    "First token": "attendant_time_to_first_token_seconds",
    "Between tokens": "attendant_inter_token_latency_seconds",
    "Request": "attendant_request_duration_seconds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel: what it draws, of which queries, by their legends."""

    title: str
    queries: dict[str, str]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    text: str = ""
    stacked: bool = False
    logarithmic: bool = False


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """Return what comes of a counter in a second, summed by some labels."""
    return f"sum by ({by}) (rate({metric}{{{MODEL}{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str, by: str = "seq_bucket") -> str:
    """Return a quantile of a histogram by some labels."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', by=f'le, {by}')})"


def ratio(part: str, whole: str, by: str = "model") -> str:
    """Return a share of two counters, each a metric with its own labels."""
    return f"{rate(*part.split('|'), by=by)} / {rate(*whole.split('|'), by=by)}"


def cost(read: bool, length: int) -> str:
    """Return what a length costs a request alone: reading so many tokens at once, or writing one behind so many."""
    coefficient = f"attendant_latency_model_coefficient{{{MODEL}, "
    if read:
        phase, tokens = 'phase=~"encode|prefill"', length
        square = (
            f'({coefficient}phase="prefill", term="quadratic"}} / 2 or {coefficient}phase="encode", term="quadratic"}})'
        )
        attended = f"{length * length} * {square}"
    else:
        phase, tokens = 'phase="decode"', 1
        attended = f'{length} * {coefficient}phase="decode", term="quadratic"}}'
    constant, linear = (f'{coefficient}{phase}, term="{term}"}}' for term in ("constant", "linear"))
    return f"max by (model, phase) ({constant} + ignoring(term) {tokens} * {linear} + ignoring(term) {attended}) >= 0"


def latency_panels(name: str, metric: str) -> list[Panel]:
    """Return the quantiles by length of a latency, and its heat map."""
    heat = f'sum by (le) (increase({metric}_bucket{{{MODEL}, seq_bucket=~"$seq_bucket"}}[$__rate_interval]))'
    return [
        Panel(
            title=f"{name}: median", queries={"<= {{seq_bucket}}": quantile(0.5, metric)}, unit="s", logarithmic=True
        ),
        Panel(
            title=f"{name}: p95 and p99",
            queries={"p95 <= {{seq_bucket}}": quantile(0.95, metric), "p99 <= {{seq_bucket}}": quantile(0.99, metric)},
            unit="s",
            logarithmic=True,
        ),
        Panel(title=f"{name}: all, at the lengths chosen above", queries={"{{le}}": heat}, kind="heatmap", unit="s"),
    ]


def sections() -> dict[str, list[Panel]]:
    """Return the panels by the row that they stand in."""
    batch, tokens = "attendant_batch_tokens_total", "attendant_tokens_total"
    deadline, slo = "attendant_deadline_requests_total", "attendant_slo_requests_total"
    return {
        "Now": [
            Panel(title="Models ready", queries={"": f"sum(attendant_model_ready{{{MODEL}}})"}, kind="stat", width=4),
            Panel(title="Running", queries={"": f"sum(attendant_requests_running{{{MODEL}}})"}, kind="stat", width=4),
            Panel(title="Waiting", queries={"": f"sum(attendant_requests_waiting{{{MODEL}}})"}, kind="stat", width=4),
            Panel(title="Output tokens/s", queries={"": rate(tokens, ', kind="output"')}, kind="stat", width=4),
            Panel(
                title="Predicted wait",
                queries={"": f"max(attendant_predicted_queue_seconds{{{MODEL}}})"},
                kind="stat",
                unit="s",
                width=4,
            ),
            Panel(
                title="Refused/s",
                queries={"": rate("attendant_requests_rejected_total")},
                kind="stat",
                unit="reqps",
                width=4,
            ),
        ],
        "Latency by length": [panel for name, metric in LATENCIES.items() for panel in latency_panels(name, metric)],
        "What a length costs: the fitted law": [
            Panel(
                title="Reading a prompt or a text at once, alone",
                queries={f"{{{{model}}}} {{{{phase}}}} {length}": cost(True, length) for length in LENGTHS},
                kind="bargauge",
                unit="s",
                text="What the latency model has learned that so many tokens cost with no queue and no neighbours.",
            ),
            Panel(
                title="The next token, alone, by context",
                queries={f"{{{{model}}}} {length}": cost(False, length) for length in LENGTHS},
                kind="bargauge",
                unit="s",
            ),
            Panel(
                title="Error of the predictions (median)",
                queries={"{{model}} {{phase}}": f"attendant_latency_model_error_ratio{{{MODEL}}}"},
                unit="percentunit",
            ),
            *(
                Panel(
                    title=f"Coefficient: {title}",
                    queries={"{{model}} {{phase}}": f'attendant_latency_model_coefficient{{{MODEL}, term="{term}"}}'},
                    unit="s",
                    logarithmic=True,
                )
                for term, title in (
                    ("constant", "each run"),
                    ("linear", "each token"),
                    ("quadratic", "each attended position"),
                )
            ),
        ],
        "Batches": [
            Panel(
                title="Mean batch size",
                queries={
                    "{{model}} {{phase}}": ratio(
                        "attendant_batch_size_sum", "attendant_batch_size_count", "model, phase"
                    )
                },
            ),
            Panel(
                title="Padding",
                queries={"{{model}} {{phase}}": ratio(f'{batch}|, kind="padding"', batch, "model, phase")},
                unit="percentunit",
            ),
            Panel(
                title="One run: p95",
                queries={"{{model}} {{phase}}": quantile(0.95, "attendant_step_seconds", "model, phase")},
                unit="s",
            ),
            Panel(
                title="Tokens/s", queries={"{{model}} {{kind}}": rate(tokens, by="model, kind")}, stacked=True, width=24
            ),
        ],
        "Queue": [
            Panel(
                title="Requests",
                queries={
                    "{{model}} running": f"sum by (model) (attendant_requests_running{{{MODEL}}})",
                    "{{model}} waiting": f"sum by (model) (attendant_requests_waiting{{{MODEL}}})",
                },
            ),
            Panel(
                title="Predicted wait of one more request",
                queries={"{{model}} {{instance}}": f"attendant_predicted_queue_seconds{{{MODEL}}}"},
                unit="s",
            ),
            Panel(
                title="Wait in the queue: p95",
                queries={"<= {{seq_bucket}}": quantile(0.95, "attendant_request_queue_seconds")},
                unit="s",
            ),
        ],
        "KV cache and prefixes": [
            Panel(
                title="KV budget reserved",
                queries={"{{model}} {{instance}}": f"attendant_kv_cache_usage_ratio{{{MODEL}}}"},
                unit="percentunit",
            ),
            Panel(
                title="KV tokens",
                queries={"{{model}} {{state}}": f"sum by (model, state) (attendant_kv_cache_tokens{{{MODEL}}})"},
                stacked=True,
            ),
            Panel(
                title="Prefix hits",
                queries={
                    "{{model}} of prompts": ratio(
                        'attendant_prefix_cache_requests_total|, result="hit"', "attendant_prefix_cache_requests_total"
                    ),
                    "{{model}} of their tokens": ratio(
                        f'{tokens}|, kind="prompt_cached"', f'{tokens}|, kind=~"prompt.*"'
                    ),
                },
                unit="percentunit",
            ),
        ],
        "Refusals, deadlines, objectives": [
            Panel(
                title="Refusals by reason",
                queries={"{{model}} {{reason}}": rate("attendant_requests_rejected_total", by="model, reason")},
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Calls by code",
                queries={"{{code}}": rate("attendant_requests_total", by="code")},
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Requests by end",
                queries={"{{reason}}": rate("attendant_requests_finished_total", by="reason")},
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Deadlines",
                queries={"{{model}} {{outcome}}": rate(deadline, by="model, outcome")},
                unit="reqps",
                stacked=True,
            ),
            Panel(
                title="Deadlines missed or refused",
                queries={"{{model}}": ratio(f'{deadline}|, outcome!="met"', deadline)},
                unit="percentunit",
            ),
            Panel(
                title="Over an objective, by length",
                queries={
                    "{{objective}} <= {{seq_bucket}}": ratio(f'{slo}|, outcome="over"', slo, "objective, seq_bucket")
                },
                unit="percentunit",
            ),
            Panel(
                title="Burn of the error budget (1 lasts a month)",
                queries={
                    f"{{{{model}}}} {{{{objective}}}} {window}": f"attendant:slo_errors:ratio_rate{window}{{{RULE}}} "
                    f"/ {ERROR_BUDGET}"
                    for window in ("5m", "1h", "6h", "3d")
                },
                logarithmic=True,
                width=24,
                text="From the recording rules of deploy/prometheus. Pages at 14.4 over an hour or 6 over six hours.",
            ),
        ],
        "The server": [
            Panel(
                title="Event loop: p99 of its lateness",
                queries={
                    "{{instance}}": "histogram_quantile(0.99, sum by (le, instance) "
                    f"(rate(attendant_event_loop_lag_seconds_bucket{{{SERVER}}}[$__rate_interval])))"
                },
                unit="s",
            ),
            Panel(
                title="Processors and memory",
                queries={
                    "{{instance}} cores": f"rate(process_cpu_seconds_total{{{SERVER}}}[$__rate_interval])",
                    "{{instance}} GiB": f"process_resident_memory_bytes{{{SERVER}}} / 2^30",
                },
            ),
            Panel(
                title="GPU",
                queries={
                    "{{instance}} {{gpu}} computes": f"attendant_gpu_utilization_ratio{{{SERVER}}}",
                    "{{instance}} {{gpu}} memory": f"attendant_gpu_memory_used_bytes{{{SERVER}}} "
                    f"/ attendant_gpu_memory_total_bytes{{{SERVER}}}",
                },
                unit="percentunit",
            ),
        ],
    }


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a variable whose values Prometheus knows; all of them are chosen at first."""
    every = {"text": "All", "value": "$__all"}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": every,
        "refresh": 2,
        "sort": 3,
    }


def variables() -> list[dict[str, Any]]:
    """Return what can be chosen above the panels."""
    models = f"attendant_model_info{{{SERVER}"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
        variable("job", "Job", "label_values(attendant_build_info, job)"),
        variable("instance", "Instance", 'label_values(attendant_build_info{job=~"$job"}, instance)'),
        variable("model", "Model", f"label_values({models}}}, name)"),
        variable("version", "Version", f'label_values({models}, name=~"$model"}}, version)'),
        variable(
            "seq_bucket", "Length", f"label_values(attendant_request_duration_seconds_count{{{MODEL}}}, seq_bucket)"
        ),
    ]


def drawn(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    """Return a panel as Grafana reads it."""
    custom: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        custom |= {"fillOpacity": 30, "stacking": {"mode": "normal", "group": "A"}}
    if panel.logarithmic:
        custom["scaleDistribution"] = {"type": "log", "log": 2}
    options: dict[str, Any] = {
        "timeseries": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"},
        "bargauge": {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal", "displayMode": "basic"},
        "heatmap": {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "yAxis": {"unit": panel.unit},
            "exemplars": {"color": "rgba(255,0,255,0.7)"},
        },
    }[panel.kind]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": expr,
                "legendFormat": legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
                "instant": panel.kind == "bargauge",
                "range": panel.kind != "bargauge",
                "exemplar": panel.kind == "heatmap",
            }
            for index, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def panels() -> list[dict[str, Any]]:
    """Return all panels, and the rows between them, each at its place."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, inside in sections().items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": ROW_HEIGHT}
        found.append(
            {"id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += ROW_HEIGHT
        x = 0
        height = STAT_HEIGHT if inside[0].kind == "stat" else HEIGHT
        for panel in inside:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            found.append(drawn(panel, len(found) + 1, {"x": x, "y": y, "w": panel.width, "h": height}))
            x += panel.width
        y += height
    return found


def dashboard() -> dict[str, Any]:
    """Return the whole dashboard."""
    return {
        "uid": "attendant",
        "title": "Attendant: latency by sequence length",
        "tags": ["attendant", "inference"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": panels(),
    }


def main() -> None:
    """Write the file."""
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
