"""The GPU suite and the benchmarks in one command that leaves report.md and report.json.

    python tests/gpu/report.py --out build/report [--part suite|bench-small|bench-1.3b|bench-7b|all]

It unpacks what `carry.py` carried (or takes what is installed, with --site none), proves the GPU build, exports what it
needs, and runs. It stops before its time is over; the same command with the same --out then goes on, and leaves with
status 3 as long as something is left, 1 if anything failed, 0 otherwise. `--device cpu` is a dry run of all of it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from carry import CARRY, SITE, guard
from carry_wheels import INSTALLED, ROOT, environment
from report_page import anything_ran, page
from report_steps import AGAIN, Done, Step, run_steps

PARTS = ("suite", "bench-small", "bench-1.3b", "bench-7b")
BUNDLES = ROOT / "build" / "gpu-bundles"
# The demo's weights are real, the others random: big ones are made on the spot.
MODELS = {"bench-small": "smollm2-135m", "bench-1.3b": "llama-1.3b", "bench-7b": "llama-7b"}
TINY = "llama-tiny"
NOTHING_CHOSEN = 5  # what pytest leaves with
HERE, BENCHMARK = Path(__file__).parent, ROOT / "tests" / "benchmarks" / "gpu.py"


def steps_for(parts: tuple[str, ...], *, device: str, carried: Path, site: Path | None, out: Path) -> list[Step]:
    """Return all steps of some parts, in order."""
    python = sys.executable
    steps: list[Step] = []
    ready: tuple[str, ...] = ()
    if site is not None:
        unpack = (python, str(HERE / "carry.py"), "unpack", "--carried", str(carried), "--site", str(site))
        steps.append(Step(name="unpack", command=(*unpack, "--unproved"), produces=site / INSTALLED))
    if device == "cuda":
        needs = tuple(step.name for step in steps)
        steps.append(Step(name="guard", command=tuple(guard(site)), needs=needs))
        ready = ("guard",)
    for part in parts:
        made = _suite(ready, out) if part == "suite" else _benchmark(part, ready, device, out)
        steps += [step for step in made if step.name not in {before.name for before in steps}]
    return steps


def _suite(ready: tuple[str, ...], out: Path) -> list[Step]:
    """Return a step for this folder, whose tests share their servers, one for its slow tests, one a file elsewhere."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path.parent != HERE]
    others = [path for path in files if "mark.gpu" in path.read_text("utf-8")]
    chosen = [("suite", "gpu and not slow", HERE), ("suite-slow", "gpu and slow", HERE)]
    chosen += [
        ("-".join(("suite", *path.relative_to(HERE.parent).with_suffix("").parts)), "gpu", path) for path in others
    ]
    made = []
    for name, marks, path in chosen:
        # Other versions than the pinned ones warn of other things, and that is no failure.
        flags = ("-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={out / name}.xml")
        command = (sys.executable, "-m", "pytest", "-m", marks, *flags, str(path.relative_to(ROOT)))
        made.append(Step(name=name, command=command, needs=ready, accepted=(0, NOTHING_CHOSEN)))
    return made


def _benchmark(part: str, ready: tuple[str, ...], device: str, out: Path) -> list[Step]:
    model, precision = (MODELS[part], "bf16") if device == "cuda" else (TINY, "fp32")
    source = ("--pretrained", model) if model == MODELS["bench-small"] else ("--synthetic", model)
    name = f"export-{model}"
    export = (sys.executable, "-m", "export", *source, str(BUNDLES), "--name", model, "--precision", precision)
    command = (sys.executable, str(BENCHMARK), "--repository", str(BUNDLES), "--model", model, "--provider", device)
    command += ("--results", str(out / f"{part}.json"))
    if device != "cuda":
        command += ("--contexts", "32", "--rows", "1", "4", "--steps", "4", "--rounds", "1", "--no-compiled")
        command += ("--memory-gib", "16")
    return [
        Step(name=name, command=(*export, "--force"), needs=ready, produces=BUNDLES / model / "1" / "manifest.json"),
        Step(name=part, command=command, needs=(*ready, name), time_flag="--seconds"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Run what is left to do and return the exit status."""
    given = _parser().parse_args(argv)
    deadline = time.monotonic() + given.seconds
    out, site = given.out.resolve(), None if given.site == "none" else Path(given.site).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = PARTS if given.part == "all" else (given.part,)
    steps = steps_for(parts, device=given.device, carried=given.carried.resolve(), site=site, out=out)
    kept = out / "report.json"
    found = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    if found.get("device", given.device) != given.device:
        print(f"error: {kept} is of the device {found['device']}: name another --out", file=sys.stderr)
        return 1
    done: Done = found.get("steps", {})
    try:
        finished = run_steps(steps, done, out, deadline, environment(site))
    finally:
        known = subprocess.run(
            [sys.executable, str(HERE / "gpu_machine.py")], env=environment(site), stdout=subprocess.PIPE, check=True
        )
        machine = json.loads(known.stdout)
        content = {"device": given.device, "machine": machine, "steps": done}
        kept.write_text(json.dumps(content, indent=1), "utf-8")
        (out / "report.md").write_text(page(steps, done, machine, given.device, out), "utf-8")
    states = {step.name: done.get(step.name, {}).get("state", "not begun") for step in steps}
    for name, state in states.items():
        print(f"{name}: {state}")
    print(f"report: {out / 'report.md'}")
    if not finished:
        return AGAIN
    if given.device == "cuda" and "suite" in parts and not anything_ran(out):
        print("error: no test of the suite ran on the GPU", file=sys.stderr)
        return 1
    return int("failed" in states.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the report is left, and gone on with")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run; default: cuda")
    parser.add_argument("--carried", type=Path, default=CARRY, help="the folder of the goes; default: build/carry")
    parser.add_argument("--site", default=str(SITE), help="where to unpack, or 'none' where nothing was carried")
    parser.add_argument("--seconds", type=float, default=570, help="before it stops; default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
