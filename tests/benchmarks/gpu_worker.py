"""A side of the comparison in a process of its own, which answers jobs: one line of JSON each way."""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Job = dict[str, Any]


class WorkerEnded(Exception):
    """A worker left before it answered; `made_to`: because its time was over."""

    def __init__(self, message: str, *, made_to: bool) -> None:
        super().__init__(message)
        self.made_to = made_to


def answer(handlers: Mapping[str, Callable[..., object]]) -> None:
    """Answer jobs from standard input until it ends; what others print goes to standard error.

    A job is {"do": name, **arguments}. Its answer is {"result": ...}, or {"error": ...} where the handler failed.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        job: Job = json.loads(line)
        try:
            told: Job = {"result": handlers[job.pop("do")](**job)}
        except Exception as error:  # a cell too large for one side must not cost the others
            traceback.print_exc()
            told = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(told), file=answers, flush=True)


class Worker:
    """A running worker; leaving its context ends it.

    Args:
        script: answers jobs.
        deadline: of `time.monotonic`, when it is killed.
    """

    def __init__(self, script: Path, deadline: float) -> None:
        self._name, self._deadline = script.stem, deadline
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._process.kill)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **arguments: object) -> Job:
        """Return the answer to a job: {"result": ...} or {"error": ...}.

        Raises:
            WorkerEnded: it left instead.
        """
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            message = f"{self._name} ended with {self._process.wait()} while it was to {do}"
            raise WorkerEnded(message, made_to=time.monotonic() >= self._deadline)
        told: Job = json.loads(line)
        return told


def spread(seconds: Sequence[float]) -> Job:
    """Return the best and the median of repeated times, and how many there were."""
    ordered = sorted(seconds)
    return {"best": ordered[0], "median": ordered[len(ordered) // 2], "count": len(ordered)}
