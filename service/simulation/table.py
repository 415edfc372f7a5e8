"""A report as a person reads it."""

from collections.abc import Mapping

from service.simulation.fleet import Run
from service.simulation.report import LengthReport, Percentiles, Report
from service.simulation.slo import Target

_HEADS = ("prompt tokens", "requests", "goodput", "ttft p50", "p95", "p99", "itl p50", "p95", "p99", "e2e p50", "p95")


def shown(report: Report) -> str:
    """Return the whole report; times in seconds."""
    replicas = f"{report.replicas} replica{'s' if report.replicas > 1 else ''}"
    lines = [
        f"{report.total.requests} requests, {replicas}, {report.seconds:.1f} s: {report.requests_per_second:.2f} "
        f"requests/s, {report.output_tokens_per_second:.0f} tokens/s",
        f"busy {report.utilisation:.1%} of the time, padding {report.padding:.1%}, longest wait "
        f"{report.total.longest_wait_seconds:.2f} s",
        "ended: " + ", ".join(f"{count} {ending}" for ending, count in report.total.endings.items()),
        "",
    ]
    return "\n".join(lines) + columns([_HEADS, *(_row(one) for one in report.by_length), _row(report.total, "all")])


def searched(runs: Mapping[int, Run], targets: tuple[Target, ...], needed: int | None) -> str:
    """Return what each number of replicas that was tried comes to."""
    heads = ("replicas", *(target.text for target in targets), "")
    rows = [
        (
            str(number),
            *(f"{target.value(run):.3g}" for target in targets),
            "enough" if all(target.is_met(run) for target in targets) else "",
        )
        for number, run in sorted(runs.items())
    ]
    said = f"{needed} replicas are needed" if needed else f"{max(runs)} replicas are too few"
    return columns([heads, *rows]) + f"\n\n{said}"


def columns(rows: list[tuple[str, ...]]) -> str:
    """Return rows of the same number of cells, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in aligned)


def _row(one: LengthReport, name: str | None = None) -> tuple[str, ...]:
    lengths = name or ("longer" if one.up_to_tokens is None else f"to {one.up_to_tokens}")
    times = (*_times(one.ttft), *_times(one.itl), *_times(one.e2e)[:2])
    return (lengths, str(one.requests), f"{one.goodput:.1%}", *times)


def _times(times: Percentiles) -> tuple[str, ...]:
    return tuple("-" if value is None else f"{value:.4g}" for value in (times.p50, times.p95, times.p99))
