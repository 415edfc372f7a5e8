"""Measurements in words: durations, ranges of lengths, quantiles."""

from collections.abc import Iterable
from math import inf, isfinite

from attendant.telemetry.histogram import Histogram

_UNITS = (
    (0.0, 1e-9, "ns"),
    (1e-6, 1e-6, "us"),
    (1e-3, 1e-3, "ms"),
    (1.0, 1.0, "s"),
    (600, 60, "min"),
    (7200, 3600, "h"),
)


def duration(seconds: float) -> str:
    """Return seconds with three digits in a unit that suits them."""
    if not isfinite(seconds) or seconds == 0:
        return f"{seconds:.3g} s"
    rounded = abs(float(f"{seconds:.3g}"))
    scale, unit = next((scale, unit) for least, scale, unit in reversed(_UNITS) if rounded >= least)
    value = rounded / scale * (-1 if seconds < 0 else 1)
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


def percent(share: float) -> str:
    """Return a share of 1 as a percentage; "-" if there was nothing to have a share of."""
    return f"{share:.1%}" if isfinite(share) else "-"


def length_names(bounds: Iterable[float]) -> dict[float, str]:
    """Return what to call the ranges of lengths under each upper bound, in rising order; the last may be infinite."""
    names, shorter = {}, 0.0
    for bound in sorted(bounds):
        names[bound] = f"<= {bound:g}" if bound < inf else f"> {shorter:g}"
        shorter = bound
    return names


def quantile_text(histogram: Histogram, q: float) -> str:
    """Return a quantile of seconds; "-" of nothing, and "> 105 s" beyond the last bound."""
    if not histogram.count:
        return "-"
    value = histogram.quantile(q)
    return duration(value) if value < inf else f"> {duration(histogram.longest)}"
