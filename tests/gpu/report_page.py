"""The report as Markdown: what ran where, with which commands, what the suite said, and the figures."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from gpu_results import Results, tables
from report_steps import Done, Step, shown


def page(steps: Sequence[Step], done: Done, machine: Mapping[str, str], device: str, out: Path) -> str:
    """Return the whole report, of a run that may not be finished."""
    lines = ["# GPU suite and benchmarks", ""]
    if device != "cuda":
        lines += [f"**A dry run on the {device}: it proves the code of the report, and says nothing of a GPU.**", ""]
    lines += ["## Machine", "", "| what | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    lines += ["", "## Steps", "", "| step | state | seconds | command |", "|---|---|---:|---|"]
    begun = {**done, **{step.name: _not_begun(step) for step in steps if step.name not in done}}
    for name, found in begun.items():
        lines.append(f"| {name} | {found['state']} | {found['seconds']} | `{found['command']}` |")
    lines += _suite(out)
    if results := sorted(out.glob("bench-*.json")):
        lines += ["", "## Benchmarks", ""]
        lines += [tables(Results(**json.loads(path.read_text("utf-8")))) for path in results]
    for name, found in done.items():
        if found["state"] != "passed":
            lines += ["", f"## {name}: {found['state']}", "", "```", found["tail"], "```"]
    return "\n".join(lines) + "\n"


def _not_begun(step: Step) -> dict[str, object]:
    return {"state": "not begun", "seconds": 0.0, "command": shown(step.command)}


def anything_ran(out: Path) -> bool:
    """Say whether any test of the suite ran, and was not passed over."""
    cases = (case for path in out.glob("suite*.xml") for case in ElementTree.parse(path).getroot().iter("testcase"))
    return any(case.find("skipped") is None for case in cases)


def _suite(out: Path) -> list[str]:
    """Return counts for each file of results, how tests failed, and why others were skipped."""
    counted, failed, skipped = [], [], Counter[str]()
    for path in sorted(out.glob("suite*.xml")):
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        wrong = [(case, found) for case in cases for tag in ("failure", "error") for found in case.findall(tag)]
        passed_over = [found for case in cases for found in case.findall("skipped")]
        failed += [f"- failed: {case.get('classname')}.{case.get('name')}: {_said(found)}" for case, found in wrong]
        skipped.update(map(_said, passed_over))
        passed = len(cases) - len(wrong) - len(passed_over)
        counted.append(f"| {path.stem} | {passed} | {len(wrong)} | {len(passed_over)} |")
    if not counted:
        return []
    head = ["", "## Suite", "", "| tests | passed | failed | skipped |", "|---|---:|---:|---:|"]
    return [*head, *counted, "", *failed, *(f"- {times} skipped: {reason}" for reason, times in skipped.items())]


def _said(found: ElementTree.Element) -> str:
    return " ".join(found.get("message", "").split())[:300]
