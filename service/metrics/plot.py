"""One plot of latency over sequence length, as SVG: measured quantiles of each range of lengths, and the fitted cost.

Both axes are logarithmic, so that a cost that doubles with the length is a straight line wherever it is. A pure
function of numbers; every mark carries the numbers that it stands for as attributes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, inf, log10

from attendant.telemetry import Histogram, Law, duration, length_names, predicted_seconds, quantile_text

QUANTILES = {"p50": 0.5, "p95": 0.95}

_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 10, 40
_POINTS = 49  # of a curve
_WITHOUT_BOUNDS = (1.0, 64.0)  # tokens, for a model so short that all of its lengths are one range


@dataclass(frozen=True, slots=True)
class Axis:
    """Places values between two pixels, on a logarithmic scale."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value; what lies outside is placed at the nearer end."""
        share = log10(min(max(value, self.low), self.high) / self.low) / log10(self.high / self.low)
        return round(self.begin + share * (self.end - self.begin), 2)


def plot(latency: str, histograms: Mapping[float, Histogram], laws: Mapping[str, Law]) -> str | None:
    """Return the SVG element, or None if nothing was measured.

    Args:
        latency: one of `attendant.telemetry.LATENCIES`.
        histograms: in seconds, by the upper bound of the length in tokens.
        laws: what each phase was learned to cost.
    """
    seen = {bound: histogram for bound, histogram in sorted(histograms.items()) if histogram.count}
    if not seen:
        return None
    ranges = _ranges(sorted(histograms))
    lengths = Axis(ranges[min(seen)][0], ranges[max(seen)][1], _LEFT, _WIDTH - _RIGHT)
    curve = [
        (length, seconds)
        for length in _spread(lengths.low, lengths.high)
        if (seconds := predicted_seconds(latency, length, laws)) is not None and seconds > 0
    ]
    measured = [_seconds(histogram, q) for histogram in seen.values() for q in QUANTILES.values()]
    times = _time_axis([*measured, *(seconds for _, seconds in curve)])
    names = length_names(histograms)
    parts = [*_grid(lengths, times, sorted({edge for bound in seen for edge in ranges[bound]}))]
    for bound, histogram in seen.items():
        parts += _marks(names[bound], ranges[bound], histogram, lengths, times)
    if curve:
        points = " ".join(f"{lengths.at(length)},{times.at(seconds)}" for length, seconds in curve)
        parts.append(
            f'<polyline class="fit" points="{points}"><title>fitted cost of computing alone</title></polyline>'
        )
    label = f"{latency}: seconds by tokens, both logarithmic; the table below has the numbers"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'data-low-tokens="{lengths.low:g}" data-high-tokens="{lengths.high:g}" '
        f'data-low-seconds="{times.low:g}" data-high-seconds="{times.high:g}">{"".join(parts)}</svg>'
    )


def _ranges(bounds: Sequence[float]) -> dict[float, tuple[float, float]]:
    """Return where each range of lengths is drawn; those without an end of their own are as wide as a doubling."""
    finite = [bound for bound in bounds if bound < inf]
    if not finite:
        return {inf: _WITHOUT_BOUNDS}
    edges = (finite[0] / 2, *finite, finite[-1] * 2)
    return {bound: (edges[index], edges[index + 1]) for index, bound in enumerate(bounds)}


def _time_axis(seconds: Sequence[float]) -> Axis:
    """Return an axis of whole decades around the given times."""
    low, high = floor(log10(min(seconds))), ceil(log10(max(seconds)))
    return Axis(10.0**low, 10.0 ** max(high, low + 1), _HEIGHT - _BOTTOM, _TOP)


def _grid(lengths: Axis, times: Axis, edges: Sequence[float]) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    for exponent in range(round(log10(times.low)), round(log10(times.high)) + 1):
        y = times.at(10.0**exponent)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{duration(10.0**exponent)}</text>'
    for edge in edges:
        x = lengths.at(edge)
        yield f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{edge:g}</text>'
    yield f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">tokens</text>'


def _marks(name: str, between: tuple[float, float], histogram: Histogram, lengths: Axis, times: Axis) -> Iterator[str]:
    """A band between the quantiles, and a line at each."""
    left, right = (lengths.at(edge) for edge in between)
    heights = {quantile: times.at(_seconds(histogram, q)) for quantile, q in QUANTILES.items()}
    top, bottom = min(heights.values()), max(heights.values())
    shown = ", ".join(f"{quantile} {quantile_text(histogram, q)}" for quantile, q in QUANTILES.items())
    yield f'<g data-tokens="{escape(name)}" data-count="{histogram.count}">'
    yield f"<title>{escape(f'{name} tokens: {shown}, of {histogram.count}')}</title>"
    yield f'<rect x="{left}" y="{top}" width="{right - left:.2f}" height="{bottom - top:.2f}"/>'
    for quantile, q in QUANTILES.items():
        y = heights[quantile]
        yield (
            f'<line class="{quantile}" x1="{left}" x2="{right}" y1="{y}" y2="{y}" '
            f'data-seconds="{histogram.quantile(q):.6g}"/>'
        )
    yield "</g>"


def _seconds(histogram: Histogram, q: float) -> float:
    """Return where a quantile is drawn: beyond the last bound nothing is known, so there."""
    return min(histogram.quantile(q), histogram.longest)


def _spread(low: float, high: float) -> list[int]:
    """Return lengths between two, evenly on a logarithmic axis."""
    return [max(1, round(low * (high / low) ** (index / (_POINTS - 1)))) for index in range(_POINTS)]
