"""The Grafana dashboard: as its script writes it, laid out without overlap, about metrics that there are.

tests/end_to_end/test_prometheus.py runs every query on a real Prometheus.
"""

import itertools
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/attendant.json"
KINDS = {"timeseries", "stat", "bargauge", "heatmap", "row"}
BUILT_IN = {"__rate_interval", "datasource"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text("utf-8"))


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def test_the_file_is_what_the_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "deploy/grafana/dashboard.py"))
    written = json.dumps(script["dashboard"](), indent=2) + "\n"
    assert DASHBOARD.read_text("utf-8") == written, "run python deploy/grafana/dashboard.py"


def test_panels_have_ids_of_their_own_and_lie_side_by_side(dashboard) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 30
    assert {panel["type"] for panel in panels} == KINDS
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in itertools.combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert beside or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    for panel in panels:
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)
        assert panel["type"] == "row" or (references and panel["title"])


def test_every_variable_is_declared_before_it_is_used_and_every_datasource_is_the_chosen_one(dashboard) -> None:
    names = re.compile(r"\$(?:\{(\w+)|(\w+))")
    declared: list[str] = []
    for variable in dashboard["templating"]["list"]:
        used = {a or b for a, b in names.findall(json.dumps(variable.get("query", "")))}
        assert used <= {*declared}, variable["name"]
        declared.append(variable["name"])
    assert {"datasource", "model", "version", "instance"} <= set(declared)
    used = {a or b for query in queries(dashboard) for a, b in names.findall(query)}
    assert used <= {*declared, *BUILT_IN}
    assert used | {"datasource"} >= set(declared)
    text = json.dumps(dashboard)
    assert set(re.findall(r'"uid": "(.*?)"', text)) == {"attendant", "${datasource}"}


def test_queries_are_about_metrics_labels_and_records_that_there_are(dashboard) -> None:
    metrics = ServerMetrics()
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    metrics.model("m/1", longest=8192)
    samples += [sample for family in metrics.registry.collect() for sample in family.samples]
    known: dict[str, set[str]] = {}
    for sample in samples:
        known.setdefault(sample.name, set()).update(sample.labels)
    records = {
        rule["record"]
        for path in (ROOT / "deploy/prometheus").glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    for query in queries(dashboard):
        for name, matchers in re.findall(r"([a-z_]+(?::\w+)*)\{(.*?)\}", query):
            labels = set(re.findall(r"(\w+)\s*[!=]~?\"", matchers)) - {"job", "instance"}
            if ":" in name:
                assert name in records, name
            elif not name.startswith("attendant_gpu_"):
                assert name in known and labels <= known[name], (name, labels)


def test_promtool_reads_every_query(dashboard, tmp_path) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    rules = [
        {"record": f"query:{index}", "expr": re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "1m"))}
        for index, query in enumerate(queries(dashboard))
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([tool, "check", "rules", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, done.stdout + done.stderr


def test_latency_cost_load_and_objectives_are_all_shown(dashboard) -> None:
    text = " ".join(queries(dashboard))
    for metric in (
        *(
            f"attendant_{name}_seconds_bucket"
            for name in ("time_to_first_token", "inter_token_latency", "request_duration")
        ),
        "attendant_latency_model_coefficient",
        "attendant_batch_size_sum",
        "attendant_batch_tokens_total",
        "attendant_requests_waiting",
        "attendant_kv_cache_usage_ratio",
        "attendant_prefix_cache_requests_total",
        "attendant_requests_rejected_total",
        "attendant_deadline_requests_total",
        "attendant:slo_errors:ratio_rate1h",
    ):
        assert metric in text, metric
    assert sum(panel["type"] == "heatmap" for panel in dashboard["panels"]) == 3
