"""A histogram that costs a token little: one bisection and two additions, where the library's takes locks.

A step of a large batch observes a gap for every row, between two tokens of all streams; so each must cost well under a
microsecond. What is exported is what the library would export, exemplars included.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import inf

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString


class Observations:
    """What was observed under one set of labels. Written on one thread; may be read on any.

    Args:
        bounds: upper bounds of the buckets, inclusive, rising; what is larger falls behind the last one.
    """

    __slots__ = ("_bounds", "_counts", "_exemplars", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: list[Exemplar | None] = [None] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, exemplar: Mapping[str, str] | None = None) -> None:
        """Count a value; `exemplar` labels, 128 characters at most, say where it is from."""
        index = bisect_left(self._bounds, value)
        self._counts[index] += 1
        self._sum += value
        if exemplar is not None:
            self._exemplars[index] = Exemplar(dict(exemplar), value, time.time())

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Write the series of these labels into a family."""
        total = 0
        buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for bound, count, exemplar in zip((*self._bounds, inf), self._counts, self._exemplars, strict=True):
            total += count
            shown = floatToGoString(bound)  # type: ignore[no-untyped-call]  # the library's own way to write a bound
            buckets.append((shown, total) if exemplar is None else (shown, total, exemplar))
        family.add_metric(labels, buckets, self._sum)


class Histogram(Collector):
    """One family: its observations by labels.

    Args:
        name: with its unit at the end.
        text: what is observed.
        labels: their names.
        bounds: of all its buckets.
        unit: of what is observed, or "".
        registry: that shows it.
    """

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        *,
        unit: str,
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._text, self._labels, self._unit = name, text, tuple(labels), unit
        self._bounds = tuple(map(float, bounds))
        self._children: dict[tuple[str, ...], Observations] = {}
        self._lock = threading.Lock()
        registry.register(self)

    def labels(self, *values: str) -> Observations:
        """Return the observations of one set of label values; they are shown from now on."""
        assert len(values) == len(self._labels), f"{self._name} has the labels {self._labels}, not {values}"
        with self._lock:
            if values not in self._children:
                self._children = {**self._children, values: Observations(self._bounds)}  # a scrape may walk the old one
            return self._children[values]

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """Name the family without its series."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._labels, unit=self._unit)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Show every series, as the registry asks for them."""
        for family in self.describe():
            for values, observations in self._children.items():
                observations.add_to(family, values)
            yield family
