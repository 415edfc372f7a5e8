"""The one command that runs suite and benchmarks: what it runs, in which order, how often, and what it tells."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report
from carry_parts import cut
from report_page import anything_ran, page
from report_steps import AGAIN, Done, Step, ended, run_steps, shown


def python(name: str, code: str, **fields: object) -> Step:
    return Step(name=name, command=(sys.executable, "-c", code), **fields)


def run(steps: list[Step], done: Done, out: Path, seconds: float = 60, least_seconds: float = 0.0) -> bool:
    return run_steps(steps, done, out, time.monotonic() + seconds, dict(os.environ), least_seconds)


def counting(path: Path, then: str = "") -> str:
    return f"open({str(path)!r}, 'a').write('x'); print('said'); {then}"


def test_what_ended_is_not_run_again_and_what_did_not_is(tmp_path):
    good, bad, later = (tmp_path / name for name in ("good", "bad", "later"))
    steps = [
        python("good", counting(good)),
        python("bad", counting(bad, "raise SystemExit(1)")),
        python("later", counting(later, f"raise SystemExit({AGAIN} if len(open({str(later)!r}).read()) < 2 else 0)")),
    ]
    done: Done = {}
    assert run(steps, done, tmp_path) is False
    assert {name: step["state"] for name, step in done.items()} == {
        "good": "passed",
        "bad": "failed",
        "later": "unfinished",
    }
    assert run(steps, done, tmp_path) is True
    assert done["later"]["state"] == "passed"
    assert run(steps, done, tmp_path) is True
    assert [path.read_text() for path in (good, bad, later)] == ["x", "x", "xx"]
    assert "said" in done["bad"]["tail"]


def test_a_step_that_outlives_the_time_is_ended_with_its_children_and_run_again(tmp_path):
    started = tmp_path / "child"
    hang = Step(name="hang", command=("sh", "-c", f"sleep 600 & echo $! > {started}; wait"))
    done: Done = {}
    assert run([hang, python("after", "")], done, tmp_path, seconds=2) is False
    assert done["hang"]["state"] == "unfinished"
    assert not ended(done, hang)
    assert "after" not in done
    cmdline = Path(f"/proc/{started.read_text().strip()}/cmdline")
    assert not cmdline.exists() or b"sleep" not in cmdline.read_bytes()


def test_a_step_with_too_little_time_is_not_begun_and_one_that_can_stop_is_told_when(tmp_path):
    tell = python("tell", "import sys; print(sys.argv[1:])", time_flag="--seconds")
    done: Done = {}
    assert run([tell], done, tmp_path, seconds=5, least_seconds=6) is False
    assert done == {}
    assert run([tell], done, tmp_path, seconds=60, least_seconds=20) is True
    assert "['--seconds', '50']" in done["tell"]["tail"]


def test_what_needs_a_step_that_failed_is_not_run_and_says_so(tmp_path):
    steps = [python("guard", "raise SystemExit(1)"), python("suite", "", needs=("guard",))]
    done: Done = {}
    assert run(steps, done, tmp_path) is True
    assert (done["suite"]["state"], done["suite"]["tail"]) == ("failed", "not run: guard did not pass")


def test_a_success_counts_as_long_as_what_it_made_is_there(tmp_path):
    made, runs = tmp_path / "made", tmp_path / "runs"
    step = python("make", counting(runs, f"open({str(made)!r}, 'w')"), produces=made)
    done: Done = {}
    run([step], done, tmp_path)
    run([step], done, tmp_path)
    assert runs.read_text() == "x"
    made.unlink()  # as on a fresh machine
    run([step], done, tmp_path)
    assert runs.read_text() == "xx"


def test_other_accepted_statuses_pass(tmp_path):
    done: Done = {}
    run([python("none", "raise SystemExit(5)", accepted=(0, 5))], done, tmp_path)
    assert done["none"]["state"] == "passed"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_everything_on_a_gpu_comes_after_the_guard_and_every_benchmark_after_its_export(device, tmp_path):
    site = tmp_path / "site"
    steps = report.steps_for(report.PARTS, device=device, carried=tmp_path, site=site, out=tmp_path)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for step in steps:
        assert all(names.index(need) < names.index(step.name) for need in step.needs)
        if device == "cuda" and step.name not in ("unpack", "guard"):
            assert "guard" in step.needs
    for part in report.PARTS[1:]:
        command = steps[names.index(part)].command
        model, precision = (report.MODELS[part], "bf16") if device == "cuda" else (report.TINY, "fp32")
        assert (command[command.index("--model") + 1], command[command.index("--provider") + 1]) == (model, device)
        export = steps[names.index(f"export-{model}")].command
        assert export[export.index("--precision") + 1] == precision
    suite = {step.command[-1] for step in steps if step.name.startswith("suite")}
    assert {"tests/gpu", "tests/models/test_decoder_on_cuda.py", "tests/service/metrics/test_gpu.py"} <= suite


def test_commands_are_shown_as_one_would_type_them():
    command = (sys.executable, str(report.BENCHMARK), "--model", "two words")
    assert shown(command) == "python tests/benchmarks/gpu.py --model 'two words'"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_a" name="test_good"/>
<testcase classname="tests.gpu.test_a" name="test_bad"><failure message="assert 1 ==&#10; 2"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_none"><skipped message="no CUDA device"/></testcase>
<testcase classname="tests.gpu.test_a" name="test_nothing"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def test_the_page_tells_counts_reasons_and_that_a_dry_run_is_one(tmp_path):
    (tmp_path / "suite-gpu-test_a.xml").write_text(JUNIT)
    done: Done = {
        "guard": {"state": "failed", "seconds": 1.0, "command": "python guard", "tail": "error: the CPU build"}
    }
    shown_page = page([python("suite", "")], done, {"device": "none"}, "cpu", tmp_path)
    for said in (
        "**A dry run on the cpu: it proves the code of the report, and says nothing of a GPU.**",
        "| device | none |",
        "| guard | failed | 1.0 | `python guard` |",
        "| suite | not begun | 0.0 | `python -c ''` |",
        "| suite-gpu-test_a | 1 | 1 | 2 |",
        "- failed: tests.gpu.test_a.test_bad: assert 1 == 2",
        "- 2 skipped: no CUDA device",
        "error: the CPU build",
    ):
        assert said in shown_page
    assert "dry run" not in page([], done, {}, "cuda", tmp_path)


def test_a_suite_of_which_nothing_ran_is_known(tmp_path):
    assert not anything_ran(tmp_path)
    skipped = "".join(line for line in JUNIT.splitlines(keepends=True) if "name=" not in line or "skipped" in line)
    (tmp_path / "suite.xml").write_text(skipped)
    assert not anything_ran(tmp_path)
    (tmp_path / "suite-slow.xml").write_text(JUNIT)
    assert anything_ran(tmp_path)


def test_a_report_of_another_device_is_not_gone_on_with(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps({"device": "cuda", "steps": {}}))
    assert report.main(["--out", str(tmp_path), "--device", "cpu", "--site", "none"]) == 1
    assert "is of the device cuda: name another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_unpacks_exports_measures_reports_and_has_then_nothing_left_to_do(tmp_path, monkeypatch, capsys):
    from test_carry import wheel

    cut([wheel(tmp_path / "shelf", "carried", "py3-none-any")], tmp_path / "carry", 1 << 20)
    monkeypatch.setattr(report, "BUNDLES", tmp_path / "bundles")
    command = ["--out", str(tmp_path / "out"), "--device", "cpu", "--part", "bench-small"]
    command += ["--carried", str(tmp_path / "carry"), "--site", str(tmp_path / "site")]
    assert report.main([*command, "--seconds", "300"]) == 0
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: step["state"] for name, step in told["steps"].items()} == {
        "unpack": "passed",
        "export-llama-tiny": "passed",
        "bench-small": "passed",
    }
    assert (tmp_path / "site" / "carried.py").is_file()
    assert told["machine"]["python"].startswith("3.")
    shown_page = (tmp_path / "out" / "report.md").read_text()
    assert "### llama-tiny, fp32, cpu" in shown_page
    assert "not judged" in shown_page
    capsys.readouterr()
    assert report.main([*command, "--seconds", "1"]) == 0  # no step would be begun
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == told["steps"]
