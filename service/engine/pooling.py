"""One vector from the vectors of a text's tokens, on their exact number: nothing depends on padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
Pooling = Literal["mean", "cls", "max", "last"]

_POOLINGS: dict[Pooling, Callable[[Vector], Vector]] = {
    "mean": lambda vectors: vectors.mean(axis=0, dtype=np.float32),
    "cls": lambda vectors: vectors[0],
    "max": lambda vectors: vectors.max(axis=0),
    "last": lambda vectors: vectors[-1],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorOptions:
    """How a vector is made: pooled, cut to its first `dimensions` components (None keeps all), scaled to length 1."""

    pooling: Pooling
    normalize: bool
    dimensions: int | None = None


def pool(vectors: Vector, options: VectorOptions) -> Vector:
    """Return the vector [D] of a text from the vectors [S, E] of its tokens; a zero vector stays zero."""
    vector = _POOLINGS[options.pooling](vectors)[: options.dimensions]
    if not options.normalize:
        return vector
    length = np.sqrt(np.square(vector, dtype=np.float64).sum())
    return (vector / length).astype(np.float32) if length > 0 else vector
