"""The report as Markdown: what ran where, with which commands, what the suite said, and the figures."""

import json
import sys
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


def _suite(out: Path) -> list[str]:
    """Return counts for each file of tests, and why tests failed or were skipped."""
    files = sorted(out.glob("suite*.xml"))
    if not files:
        return []
    counted, reasons = [], []
    for path in files:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        numbers = {"failed": 0, "skipped": 0}
        for case in cases:
            for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
                for found in (one for tag in tags for one in case.findall(tag)):
                    numbers[kind] += 1
                    said = " ".join(found.get("message", "").split())[:300]
                    reasons.append(f"- {kind}: {case.get('classname')}.{case.get('name')}: {said}")
        passed = len(cases) - sum(numbers.values())
        counted.append(f"| {path.stem} | {passed} | {numbers['failed']} | {numbers['skipped']} |")
    head = ["", "## Suite", "", "| tests | passed | failed | skipped |", "|---|---:|---:|---:|"]
    return [*head, *counted, "", *reasons]
