"""Attention weights as values: what every drawing shows, and the entropies that it states. Knows nothing of drawing.

Shapes: T rows (queries), S columns (keys). Masks are boolean, True = attend. Entropies are in nats.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import fsum, isfinite, log
from typing import Any, Protocol, Self, TypeAlias, TypeVar


class HasToList(Protocol):
    """An array: of NumPy, of PyTorch, or a memoryview."""

    def tolist(self) -> Any:
        """Return the elements as nested lists of Python's own numbers."""


Matrix: TypeAlias = Sequence[Sequence[float]] | Sequence[HasToList] | HasToList
Cell = TypeVar("Cell")


def entropy_nats(row: Iterable[float]) -> float:
    """Return the entropy in nats of weights that are taken relative to their sum, so that rounding does not matter.

    It is exactly 0 for a single choice and for a row without any weight, and never above the logarithm of the number
    of weights above 0, rounding aside.

    Raises:
        ValueError: a weight is negative, infinite or not a number.
    """
    weights = list(row)
    for index, weight in enumerate(weights):
        _check_weight(weight, f"weight {index}")
    largest = max(weights, default=0.0)
    if largest == 0.0:
        return 0.0
    shares = [weight / largest for weight in weights]  # the sum of huge weights would not be finite
    total = fsum(shares)
    return max(0.0, -fsum(share / total * log(share / total) for share in shares if share / total > 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMap:
    """The weights of one head: row t says how the query `rows[t]` shares its attention among the keys `columns`.

    `mask` says which keys a row may attend to; None is all. Labels are tokens as they are: each drawing makes them
    safe. `AttentionMap.of` makes one from arrays.

    Raises:
        ValueError: rows are of unequal length, labels do not match, a weight is negative or not finite, or a weight
            that the mask hides is not 0, as when a mask is given the other way round.
    """

    weights: tuple[tuple[float, ...], ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    mask: tuple[tuple[bool, ...], ...] | None = None
    title: str = ""

    def __post_init__(self) -> None:
        self._check_shape("weights", self.weights)
        for t, row in enumerate(self.weights):
            for s, weight in enumerate(row):
                _check_weight(weight, f"weights row {t}, column {s}")
        if self.mask is None:
            return
        self._check_shape("mask", self.mask)
        for t, allowed in enumerate(self.mask):
            for s, (weight, allows) in enumerate(zip(self.weights[t], allowed, strict=True)):
                if not isinstance(allows, bool):
                    raise ValueError(f"mask row {t}, column {s} is {allows!r}; give booleans, True = attend")
                if weight and not allows:
                    raise ValueError(
                        f"weights row {t}, column {s} is {weight} where mask is False; "
                        "a hidden cell has weight 0, and True = attend"
                    )

    @classmethod
    def of(
        cls,
        weights: Matrix,
        *,
        rows: Iterable[str],
        columns: Iterable[str],
        mask: Matrix | None = None,
        title: str = "",
    ) -> Self:
        """Make a map from nested sequences or from anything with `tolist`, such as an array (T, S).

        Raises:
            ValueError: as for the class, or the weights or the mask have not two axes.
        """
        return cls(
            weights=_nested(weights, "weights", float),
            rows=tuple(rows),
            columns=tuple(columns),
            mask=None if mask is None else _nested(mask, "mask", lambda cell: cell),
            title=title,
        )

    def allows(self, row: int, column: int) -> bool:
        """Say whether the mask lets a row attend to a column."""
        return self.mask is None or self.mask[row][column]

    def count(self, row: int) -> int:
        """Return how many columns a row may attend to."""
        return len(self.columns) if self.mask is None else sum(self.mask[row])

    @property
    def sums(self) -> tuple[float, ...]:
        """The sum of each row: 1, or 0 where nothing may be attended to, unless the weights are unusual."""
        return tuple(map(fsum, self.weights))

    @property
    def entropies(self) -> tuple[float, ...]:
        """The entropy of each row."""
        return tuple(map(entropy_nats, self.weights))

    @property
    def maxima(self) -> tuple[float, ...]:
        """The largest entropy that each row could have: ln n of n columns; 0 where there are none."""
        return tuple(log(max(1, self.count(row))) for row in range(len(self.rows)))

    @property
    def mean_entropy(self) -> float:
        """The mean entropy of the rows that may attend to anything; 0 if none may."""
        return self._mean(self.entropies)

    @property
    def mean_maximum(self) -> float:
        """The mean of the largest entropies of the same rows."""
        return self._mean(self.maxima)

    def _mean(self, values: Sequence[float]) -> float:
        counted = [value for row, value in enumerate(values) if self.count(row)]
        return fsum(counted) / len(counted) if counted else 0.0

    def _check_shape(self, name: str, cells: Sequence[Sequence[object]]) -> None:
        if len(cells) != len(self.rows):
            raise ValueError(f"{name} has {len(cells)} rows; there are {len(self.rows)} row labels")
        for t, row in enumerate(cells):
            if len(row) != len(self.columns):
                raise ValueError(f"{name} row {t} has {len(row)} cells; there are {len(self.columns)} column labels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One attention of a model, such as "cross-attention, layer 2", with a map for each of its heads."""

    title: str
    heads: tuple[AttentionMap, ...]

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError(f"layer {self.title!r} has no heads; give at least one map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """All that one page shows: the attention of a model over one input, by layer and head."""

    title: str
    layers: tuple[Layer, ...]


def _check_weight(weight: float, where: str) -> None:
    if not (isfinite(weight) and weight >= 0.0):
        raise ValueError(f"{where} is {weight}; a weight is a number of at least 0")


def _nested(matrix: Any, name: str, convert: Callable[[Any], Cell]) -> tuple[tuple[Cell, ...], ...]:
    try:
        return tuple(tuple(convert(cell) for cell in _plain(row)) for row in _plain(matrix))
    except TypeError as error:
        raise ValueError(f"{name} must have two axes, rows and columns, and hold numbers ({error})") from error


def _plain(axis: Any) -> Any:
    return axis.tolist() if hasattr(axis, "tolist") else axis
