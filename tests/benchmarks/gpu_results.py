"""What was measured so far, kept in a file so that the next run goes on where this one stopped, and shown as tables."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from gpu_cells import SHAPES, Ceilings, decode_floor, prefill_floor

SIDES = ("ours", "theirs")
DECODE_TARGETS = {("llama-7b", 1): 0.80, ("llama-7b", 128): 0.60}
OVERHEAD_TARGET = 0.05


@dataclass(slots=True, kw_only=True)
class Results:
    """All rounds of one model on one device.

    `rounds` are by kind ("decode" or "prefill"), context and rows, as `key` writes them, then by side; a side that
    cannot do a cell has its reason in `failed`. `served` is tokens a second through gRPC, by streams.
    """

    model: str
    shape: str
    provider: str
    precision: str = ""
    sha256: str = ""
    ceilings: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    served: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, model: str, shape: str, provider: str) -> Self:
        """Return what a file holds, or nothing yet.

        Raises:
            ValueError: it holds the figures of something else.
        """
        if not path.is_file():
            return cls(model=model, shape=shape, provider=provider)
        found = cls(**json.loads(path.read_text("utf-8")))
        if (found.model, found.shape, found.provider) != (model, shape, provider):
            raise ValueError(f"{path} holds {found.model} on {found.provider}: name another file with --results")
        return found

    def write(self, path: Path) -> None:
        """Keep them, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(self), indent=1), "utf-8")
        unfinished.replace(path)

    def missing(self, cell: str, side: str, rounds: int) -> int:
        """Return how many rounds a side still owes a cell."""
        if side in self.failed.get(cell, {}):
            return 0
        return max(0, rounds - len(self.rounds.get(cell, {}).get(side, [])))

    def record(self, cell: str, side: str, told: dict[str, Any]) -> None:
        """Add a worker's answer."""
        if "error" in told:
            self.failed.setdefault(cell, {})[side] = told["error"]
        else:
            self.rounds.setdefault(cell, {}).setdefault(side, []).append(told["result"])


def key(kind: str, context: int, rows: int) -> str:
    """Return a cell's name."""
    return f"{kind}/{context}/{rows}"


def _median(rounds: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(read, rounds))


def tables(results: Results) -> str:
    """Return the figures as Markdown. On the CPU no target is judged: the run proves the code, and no speed."""
    ceilings = Ceilings(**results.ceilings) if results.ceilings else None
    lines = [f"### {results.model}, {results.precision}, {results.provider}", ""]
    if ceilings is not None:
        lines += [
            f"Measured ceilings: copy {ceilings.bandwidth / 1e9:.0f} GB/s (read and written), matrix product "
            f"{ceilings.matrix_peak / 1e12:.1f} TFLOP/s.",
            "",
        ]
        lines += _decode_table(results, ceilings) + _prefill_table(results, ceilings)
    if results.served:
        lines += ["", "| streams through gRPC | tokens/s, median | best |", "|---:|---:|---:|"]
        lines += [
            f"| {streams} | {statistics.median(rates):.0f} | {max(rates):.0f} |"
            for streams, rates in results.served.items()
        ]
    for cell, reasons in results.failed.items():
        lines += [f"- {cell}, {side}: {reason}" for side, reason in reasons.items()]
    return "\n".join(lines) + "\n"


def _cells(results: Results, kind: str) -> list[tuple[int, int, dict[str, list[dict[str, Any]]]]]:
    named = [(name.split("/"), sides) for name, sides in results.rounds.items()]
    return sorted(
        ((int(context), int(rows), sides) for (found, context, rows), sides in named if found == kind),
        key=lambda cell: cell[:2],
    )


def _decode_table(results: Results, ceilings: Ceilings) -> list[str]:
    lines = [
        "| context | batch | tokens/s ours, median (best) | transformers | ours / theirs "
        "| of the roofline, ours | theirs | overhead of a step | targets |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for context, rows, sides in _cells(results, "decode"):
        floor = decode_floor(SHAPES[results.shape], rows, context, results.precision, ceilings)
        shown, reached = [], {}
        for side in SIDES:
            if rounds := sides.get(side):
                median = _median(rounds, lambda one: one["step"]["median"])
                best = min(one["step"]["best"] for one in rounds)
                shown.append(f"{rows / median:.0f} ({rows / best:.0f})")
                reached[side] = floor / median
            else:
                shown.append("-")
        ratio = f"{reached['ours'] / reached['theirs']:.2f}" if len(reached) == 2 else "-"
        shares = [f"{100 * reached[side]:.1f} %" if side in reached else "-" for side in SIDES]
        overhead = None
        if "ours" in reached:
            overhead = _median(sides["ours"], lambda one: 1 - one["graph"]["median"] / one["step"]["median"])
        told = "-" if overhead is None else f"{100 * overhead:.1f} %"
        cells = [context, rows, *shown, ratio, *shares, told, _judged(results, rows, reached, overhead)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _judged(results: Results, rows: int, reached: dict[str, float], overhead: float | None) -> str:
    if results.provider != "cuda":
        return "not judged"
    if overhead is None:
        return "ours is missing"
    checks = {f"overhead <= {OVERHEAD_TARGET:.0%}": overhead <= OVERHEAD_TARGET}
    if "theirs" in reached:
        checks["nearer than transformers"] = reached["ours"] > reached["theirs"]
    if (target := DECODE_TARGETS.get((results.shape, rows))) is not None:
        checks[f">= {target:.0%}"] = reached["ours"] >= target
    return ", ".join(f"{name}: {'met' if met else 'MISSED'}" for name, met in checks.items())


def _prefill_table(results: Results, ceilings: Ceilings) -> list[str]:
    lines = [
        "",
        "| prompt | first token ours, median (best) ms | transformers | prefill tokens/s, ours | theirs "
        "| of the roofline, ours | theirs |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens, _, sides in _cells(results, "prefill"):
        floor = prefill_floor(SHAPES[results.shape], tokens, results.precision, ceilings)
        seconds = {side: [one["first_token"] for one in sides[side]] for side in SIDES if sides.get(side)}
        medians = {side: statistics.median(times) for side, times in seconds.items()}
        cells: list[object] = [tokens]
        cells += [f"{1e3 * medians[s]:.1f} ({1e3 * min(seconds[s]):.1f})" if s in medians else "-" for s in SIDES]
        cells += [f"{tokens / medians[s]:.0f}" if s in medians else "-" for s in SIDES]
        cells += [f"{100 * floor / medians[s]:.1f} %" if s in medians else "-" for s in SIDES]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
