"""How well a query fits each place of a memory: the scores that a normaliser turns into weights.

A score makes keys of the memory once (`project`) and then compares any number of queries with them. Half-precision
products are computed in float32, in which they cannot overflow.

Shapes: B rows, T queries, S places, Q query width, M memory width, A width of keys. Source: Bahdanau, Cho and Bengio,
Neural Machine Translation by Jointly Learning to Align and Translate, 2014, arXiv:1409.0473; Luong, Pham and Manning,
Effective Approaches to Attention-based Neural Machine Translation, 2015, arXiv:1508.04025.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Score(nn.Module):
    """Compares queries (B, T, Q) with the keys of a memory (B, S, M).

    `d_key` is the width A of the keys, or None where the memory itself serves as keys.
    """

    def __init__(self, d_query: int, d_memory: int, d_key: int | None = None):
        super().__init__()
        self.d_query = d_query
        self.d_memory = d_memory
        self.d_key = d_key

    def project(self, memory: Tensor) -> Tensor:
        """Return the keys (B, S, A) of a memory (B, S, M)."""
        return memory


class Dot(Score):
    """The product q.k of Luong et al., unscaled.

    Raises:
        ValueError: query and memory differ in width.
    """

    def __init__(self, d_query: int, d_memory: int):
        super().__init__(d_query, d_memory)
        if d_query != d_memory:
            raise ValueError(
                f"query width {d_query} differs from memory width {d_memory}; dot scores compare them as they are: "
                "make them equal, or take general, which has a matrix between them"
            )

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return scores (B, T, S)."""
        return _products(query, keys)


class ScaledDot(Dot):
    """The product times a scale: 1 / sqrt(Q) as in Vaswani et al., or learned from there.

    Raises:
        ValueError: query and memory differ in width.
    """

    def __init__(self, d_query: int, d_memory: int, *, learned: bool = False):
        super().__init__(d_query, d_memory)
        scale = 1.0 / math.sqrt(d_query)
        self.scale: Tensor | float = nn.Parameter(torch.tensor(scale)) if learned else scale

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return scores (B, T, S)."""
        return super().forward(query, keys) * self.scale


class General(Score):
    """The bilinear product q.W k of Luong et al.; the matrix is applied to queries, so that keys need no state."""

    def __init__(self, d_query: int, d_memory: int):
        super().__init__(d_query, d_memory)
        self.query = nn.Linear(d_query, d_memory, bias=False)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return scores (B, T, S)."""
        return _products(self.query(query), keys)


class Additive(Score):
    """The perceptron v.tanh(W q + U k + b) of Bahdanau et al.; Luong's concat is the same with [W U] as one matrix.

    Scoring takes memory for B x T x S x A numbers: it is made for recurrent decoders, whose T is 1.

    Args:
        d_query: Q.
        d_memory: M.
        d_key: A.
        bias: whether there is a b; there is none in the papers.
        weight_norm: v becomes g v / |v| with a learned g, which begins at 1 / sqrt(A) (Salimans and Kingma, Weight
            Normalization, 2016, arXiv:1602.07868).
    """

    def __init__(self, d_query: int, d_memory: int, d_key: int, *, bias: bool = False, weight_norm: bool = False):
        super().__init__(d_query, d_memory, d_key)
        self.query = nn.Linear(d_query, d_key, bias=bias)
        self.key = nn.Linear(d_memory, d_key, bias=False)
        self.weight = nn.Parameter(torch.empty(d_key))
        self.gain = nn.Parameter(torch.tensor(1.0 / math.sqrt(d_key))) if weight_norm else None
        nn.init.uniform_(self.weight, -1.0 / math.sqrt(d_key), 1.0 / math.sqrt(d_key))

    def project(self, memory: Tensor) -> Tensor:
        """Return the keys U k, (B, S, A), of a memory (B, S, M)."""
        return self.key(memory)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return scores (B, T, S)."""
        hidden = torch.tanh(self.query(query)[:, :, None] + keys[:, None])  # (B, T, S, A)
        weight = self.weight if self.gain is None else self.gain * F.normalize(self.weight, dim=0)
        return hidden @ weight


class Constant(Score):
    """The same score everywhere, so that a softmax gives the mean: the ablation of all others."""

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return zeros (B, T, S)."""
        return query.new_zeros(keys.shape[0], query.shape[1], keys.shape[1])


SCORES: dict[str, Callable[[int, int, int], Score]] = {
    "additive": Additive,
    "concat": Additive,
    "dot": lambda d_query, d_memory, _: Dot(d_query, d_memory),
    "scaled": lambda d_query, d_memory, _: ScaledDot(d_query, d_memory),
    "general": lambda d_query, d_memory, _: General(d_query, d_memory),
    "mean": lambda d_query, d_memory, _: Constant(d_query, d_memory),
}
"""Scores by the names of configurations, made from the widths of queries, memory and keys."""


def score_named(name: str, d_query: int, d_memory: int, d_key: int) -> Score:
    """Return the score that a configuration names; `d_key` matters only to additive ones.

    Raises:
        ValueError: there is none of that name, or the widths do not suit it.
    """
    if name not in SCORES:
        raise ValueError(f"score is {name!r}; it must be one of {', '.join(SCORES)}")
    return SCORES[name](d_query, d_memory, d_key)


def _products(query: Tensor, keys: Tensor) -> Tensor:
    if query.dtype in (torch.float16, torch.bfloat16):
        query, keys = query.float(), keys.float()
    return query @ keys.mT
