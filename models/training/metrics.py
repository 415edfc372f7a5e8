"""The figures of a run, one JSON object per line, in the order of steps."""

import json
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to a JSONL file; each has the number of steps done, and one file describes one run.

    Args:
        path: the file.
        steps_done: where the run continues; records of later steps, written before an interruption, are dropped.
    """

    def __init__(self, path: Path, *, steps_done: int = 0):
        self._path = path
        kept = [record for record in self.read(path) if record["step"] <= steps_done] if steps_done else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write(self, step: int, **figures: float | str) -> None:
        """Append one record; it is on disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Return all whole records; a last line cut off by a crash is left out."""
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
