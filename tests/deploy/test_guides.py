"""docs/deploy.md and docs/operations.md name what exists: files, alerts, components, settings."""

import re
from pathlib import Path

import yaml

from service.settings import Settings


def test_the_runbook_has_every_alert_and_no_other(root) -> None:
    alerts = {
        rule["alert"]
        for path in Path(root, "deploy/prometheus").glob("*.yml")
        for group in yaml.safe_load(path.read_text()).get("groups", ())
        for rule in group["rules"]
        if "alert" in rule
    }
    runbook = re.findall(r"^### (Attendant\w+)$", Path(root, "docs/operations.md").read_text(), re.MULTILINE)
    assert alerts == set(runbook)
    assert len(runbook) == len(alerts)


def test_every_file_that_the_guides_name_exists(root) -> None:
    for guide in ("deploy.md", "operations.md"):
        text = Path(root, "docs", guide).read_text()
        named = set(re.findall(r"(?<![\w/])(?:deploy|docs)/[\w./-]*\w", text)) - {"deploy/kubernetes/overlays/mine"}
        for path in named:
            if not path.startswith("deploy/kubernetes/overlays/mine/"):
                assert Path(root, path).exists(), f"{guide} names {path}"
        for path in re.findall(r"\]\((?!http)([\w./-]+)\)", text):
            assert Path(root, "docs", path).exists(), f"{guide} links to {path}"


def test_the_table_of_components_is_complete(root) -> None:
    text = Path(root, "docs/deploy.md").read_text()
    table = text[text.index("| component |") : text.index("Settings of the server")]
    named = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert named == {path.name for path in Path(root, "deploy/kubernetes/components").iterdir()}


def test_every_flag_that_the_guides_name_is_a_setting(root) -> None:
    settings = {name.replace("_", "-") for name in Settings.model_fields}
    for guide in ("deploy.md", "operations.md"):
        text = Path(root, "docs", guide).read_text()
        assert set(re.findall(r"\(`--([\w-]+)`\)", text)) <= settings
        assert {name.lower().replace("_", "-") for name in re.findall(r"ATTENDANT_([A-Z_]+)", text)} <= settings
