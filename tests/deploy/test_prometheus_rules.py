"""Recording and alerting rules: unit-tested by promtool, and about metrics that there are."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from service.metrics import ServerMetrics

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/prometheus").glob("*.yml"))
UNIT_TESTS = Path(__file__).parent / "prometheus/rules.test.yml"


def rules() -> list[dict[str, object]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture
def promtool():
    """Run promtool, which must succeed."""
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")

    def run(*arguments: object) -> None:
        done = subprocess.run([tool, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_promtool_finds_nothing_wrong_with_the_rules(promtool) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_the_rules_pass_their_unit_tests(promtool) -> None:
    promtool("test", "rules", UNIT_TESTS)


def test_every_alert_has_a_unit_test_in_which_it_fires_and_says_what_happened() -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    fire = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case.get("exp_alerts")}
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == fire
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule
        assert set(rule["annotations"]) == {"summary", "description"}, rule


def test_rules_are_about_metrics_labels_and_records_that_there_are() -> None:
    metrics = ServerMetrics()
    labels = {"job", "instance", "le"}
    known = {"up"}
    for family in metrics.families:
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        known |= {family.name + suffix for suffix in suffixes}
        labels |= set(family.labels)
    known |= {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        expression = str(rule["expr"])
        names = re.findall(r"\b(attendant[:_][a-zA-Z0-9_:]+|up)\b", expression)
        assert names and set(names) <= known, (rule, set(names) - known)
        used = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression)
        used += [name for listed in re.findall(r"by \(([^)]*)\)", expression) for name in listed.split(", ")]
        assert set(used) <= labels, (rule, set(used) - labels)
