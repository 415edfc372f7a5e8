"""Steps of the report: commands with a time limit, of which those that ended are not run again."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
AGAIN = 3
"""What a command leaves with when its time was over and it can go on: the benchmark does."""
_TAIL_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command and what must have happened before.

    `needs` are steps without whose success this one is not run. `accepted` are the exit statuses that are a success;
    a failure ends it as well, and is told. A success counts only as long as what it `produces` is there, which a fresh
    machine has not. `time_flag`, if any, is told how many seconds are left.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    accepted: tuple[int, ...] = (0,)
    produces: Path | None = None
    time_flag: str | None = None


Done = dict[str, dict[str, Any]]


def shown(command: Sequence[str]) -> str:
    """Return a command as one would type it in the checkout, whatever this machine's paths are."""
    return shlex.join(command).replace(sys.executable, "python", 1).replace(f"{ROOT}/", "")


def ended(done: Done, step: Step) -> bool:
    """Say whether a step came to an end, a good or a bad one."""
    state = done.get(step.name, {}).get("state")
    return state == "failed" or (state == "passed" and (step.produces is None or step.produces.exists()))


def run_steps(
    steps: Sequence[Step],
    done: Done,
    out: Path,
    deadline: float,
    environment: Mapping[str, str],
    least_seconds: float = 20,
) -> bool:
    """Run what has not ended yet, in order, and write to `done` what came of it.

    Args:
        steps: all of them.
        done: by name, of this and of earlier runs.
        out: each step leaves its output in NAME.log there.
        deadline: of `time.monotonic`; a step that still runs then is ended, and is run again next time.
        environment: of all commands.
        least_seconds: with less left no step is begun; what can stop by itself has half of it to do so.

    Returns:
        Whether all have ended.
    """
    for step in steps:
        if ended(done, step):
            continue
        if missing := [name for name in step.needs if done.get(name, {}).get("state") != "passed"]:
            done[step.name] = {"state": "failed", "command": shown(step.command), "seconds": 0.0}
            done[step.name]["tail"] = f"not run: {', '.join(missing)} did not pass"
            continue
        left = deadline - time.monotonic()
        if left < least_seconds:
            return False
        flag = () if step.time_flag is None else (step.time_flag, f"{left - least_seconds / 2:.0f}")
        done[step.name] = _run(step, (*step.command, *flag), out, deadline, environment)
    return all(ended(done, step) for step in steps)


def _run(
    step: Step, command: tuple[str, ...], out: Path, deadline: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    log, started = out / f"{step.name}.log", time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(deadline - started)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)  # servers and workers of it too
            process.wait()
    over = status in (None, AGAIN)
    return {
        "state": "unfinished" if over else "passed" if status in step.accepted else "failed",
        "status": status,
        "command": shown(command),
        "seconds": round(time.monotonic() - started, 1),
        "tail": log.read_text("utf-8", errors="replace")[-_TAIL_CHARACTERS:],
    }
