"""What an item's logits mean: probabilities, and the largest of them. Shapes: classes or vocabulary C."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The most probable classes of each row, best first: index, probability and logit, each [..., k]."""

    index: NDArray[np.int64]
    probability: Array
    logit: Array


def softmax(logits: Array) -> Array:
    """Return probabilities that sum to 1 over the last axis; summed in float64."""
    wide = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(wide / wide.sum(axis=-1, keepdims=True), np.float32)


def sigmoid(logits: Array) -> Array:
    """Return the probability of each logit by itself; no value overflows."""
    wide = np.exp(-np.abs(logits.astype(np.float64)))
    return (np.where(logits >= 0, 1.0, wide) / (1.0 + wide)).astype(np.float32)


def rank(logits: Array, top_k: int, *, multi_label: bool = False) -> Ranking:
    """Return the `top_k` largest of logits [..., C], of equals the first."""
    probability = sigmoid(logits) if multi_label else softmax(logits)
    index = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    taken = (np.take_along_axis(array, index, axis=-1) for array in (probability, logits))
    return Ranking(index, *taken)
