"""Writes the rules of deploy/prometheus as the object that the Prometheus operator takes.

python deploy/kubernetes/prometheus_rule.py

The rules are written once, as Prometheus reads them and promtool tests them; this wraps them and changes nothing.
"""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parent.parent
TARGET = DEPLOY / "kubernetes/components/prometheus-operator/prometheusrule.yaml"
HEADER = "# Written by prometheus_rule.py from deploy/prometheus: change the rules there and run it again.\n"


def prometheus_rule() -> str:
    """Return the text of the object."""
    files = sorted(DEPLOY.joinpath("prometheus").glob("*.yml"))
    contents = [yaml.safe_load(path.read_text("utf-8")) for path in files]
    groups = [group for content in contents for group in content.get("groups", ())]
    found = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "attendant", "namespace": "attendant"},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.safe_dump(found, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule(), encoding="utf-8")
    print(f"{TARGET} is written")
