"""A real Prometheus scrapes a real server under load: every rule, and every query of the dashboards, has an answer."""

import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from attendant.v1 import generation_pb2 as pb

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/prometheus").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "deploy/grafana").glob("*.json"))
PATIENCE = 30.0  # seconds
VARIABLES = {"__rate_interval": "10s", "__interval": "10s", "__range": "30s"}


class Prometheus:
    """`prometheus` on a free port, which scrapes one target and evaluates our rules twice a second."""

    def __init__(self, directory: Path, target: str) -> None:
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(path) for path in RULES],
            "scrape_configs": [{"job_name": "attendant", "static_configs": [{"targets": [target]}]}],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [shutil.which("prometheus") or "", f"--config.file={directory}/prometheus.yml"]
        command += [f"--storage.tsdb.path={directory}/data", "--web.listen-address=127.0.0.1:0"]
        command += ["--enable-feature=exemplar-storage"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert self._process.stderr is not None
        lines = []
        for line in self._process.stderr:
            lines.append(line)
            if found := re.search(r'"Listening on" address=(\S+)', line):
                self._address = found[1]
                break
        else:
            self.close()
            pytest.fail(f"Prometheus did not start: {''.join(lines)}")
        # What it says from now on nobody reads; it must not wait for a reader.
        self._reader = threading.Thread(target=self._process.stderr.read, daemon=True)
        self._reader.start()
        self._wait_ready()

    def _wait_ready(self) -> None:
        """It listens before it answers queries."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=PATIENCE):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                assert time.monotonic() < deadline, "Prometheus never became ready"

    def get(self, path: str, **parameters: str) -> Any:
        """Ask the HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{self._address}/api/v1/{path}?{query}", timeout=30) as response:
            return json.loads(response.read())["data"]

    def values(self, expression: str) -> list[float]:
        """Return the values of an expression now."""
        return [float(sample["value"][1]) for sample in self.get("query", query=expression)["result"]]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        if hasattr(self, "_reader"):
            self._reader.join()
        assert self._process.stderr is not None
        self._process.stderr.close()


@pytest.fixture(scope="module")
def loaded(module_start):
    """A server that is called all the time, by short and long requests, some of which fail."""
    server = module_start("--models", "tiny-fp32", "--seq-buckets", "16,64,128").wait_ready()
    stop = threading.Event()

    def call(length: int, budget: float) -> None:
        while not stop.is_set():
            fields: dict[str, object] = {"token_ids": pb.TokenIds(ids=range(10, 10 + length))}
            try:
                list(server.long_answer(12, timeout=budget, request_id=f"of-{length}", **fields))
                list(server.generate(prompt=""))
            except grpc.RpcError:
                pass

    loads = ((8, 60.0), (40, 60.0), (100, 60.0), (240, 60.0), (8, 0.004))
    threads = [threading.Thread(target=call, args=load) for load in loads]
    for thread in threads:
        thread.start()
    yield server
    stop.set()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def prometheus(loaded, tmp_path_factory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (Debian: apt-get install prometheus)")
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{loaded.metrics_port}")
    yield prometheus
    prometheus.close()


def has_data(values: list[float]) -> bool:
    """Whether a query has an answer that is a number."""
    return any(not math.isnan(value) for value in values)


def test_the_server_is_scraped_and_every_recording_rule_has_data(prometheus, eventually) -> None:
    records = [
        rule["record"]
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    ]
    missing = set(records)

    def all_have_data() -> bool:
        missing.difference_update(name for name in list(missing) if has_data(prometheus.values(name)))
        return not missing

    try:
        eventually(all_have_data)
    except AssertionError:
        pytest.fail(f"no data from {sorted(missing)}")
    assert prometheus.values('up{job="attendant"}') == [1.0]
    assert len(prometheus.values("attendant:time_to_first_token_seconds:p95_5m")) == 4, "one for each length"


def test_every_rule_is_evaluated_without_error_and_none_is_slow(prometheus, eventually) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    eventually(lambda: all(rule["health"] == "ok" for rule in rules()))
    assert {rule["type"] for rule in rules()} == {"recording", "alerting"}
    names = {rule["name"] for rule in rules() if rule.get("state") in ("pending", "firing")}
    assert not names & {"AttendantTargetDown", "AttendantAbsent", "AttendantModelNotServing"}


def test_exemplars_name_the_request_that_fell_into_a_bucket(prometheus, eventually) -> None:
    def named() -> set[str]:
        found = prometheus.get(
            "query_exemplars", query="attendant_time_to_first_token_seconds_bucket", start="0", end="9999999999"
        )
        return {each["labels"]["request_id"] for series in found for each in series["exemplars"]}

    eventually(lambda: named() >= {"of-8", "of-40", "of-100", "of-240"})


def expressions(dashboard: Path) -> list[str]:
    """Return the queries of a dashboard, its variables filled in."""

    def fill(match: re.Match[str]) -> str:
        return VARIABLES.get(match[1] or match[2], ".*")

    def walk(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("expr"), str):
                yield re.sub(r"\$(?:\{(\w+)(?::\w+)?\}|(\w+))", fill, node["expr"])
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return list(walk(json.loads(dashboard.read_text("utf-8"))))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_has_data(prometheus, eventually, dashboard) -> None:
    queries = [query for query in expressions(dashboard) if "attendant_gpu_" not in query]  # there may be none
    assert queries, "a dashboard without a query"
    missing = set(queries)

    def all_have_data() -> bool:
        missing.difference_update(query for query in list(missing) if has_data(prometheus.values(query)))
        return not missing

    try:
        eventually(all_have_data)
    except AssertionError:
        pytest.fail("no data from " + "\n".join(sorted(missing)))
