"""Attention of a single head to a memory, by any score and any normaliser: that of recurrent decoders.

Shapes: B rows, T queries, S places, Q query width, M memory width, A width of keys.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention.normalizers import Normalizer, masked_softmax
from models.attention.scores import Score
from models.states import SOURCE, StateRule, StateSpec


class Recalled(NamedTuple):
    """The context (B, T, M) that was read, and the weights (B, T, S) if asked for."""

    context: Tensor
    weights: Tensor | None


class MemoryAttention(nn.Module):
    """Reads from a memory what fits a query: a score, a normaliser, and the weighted sum of the places.

    Args:
        score: compares queries with the memory.
        normalizer: turns masked scores into weights.
    """

    def __init__(self, score: Score, normalizer: Normalizer = masked_softmax):
        super().__init__()
        self.score = score
        self.normalizer = normalizer

    def state_specs(self, dtype: torch.dtype = torch.float32) -> tuple[StateSpec, ...]:
        """Declare the memory, and its keys where they are not the memory itself."""
        widths = {"memory": self.score.d_memory, "keys": self.score.d_key}
        return tuple(
            StateSpec(name=name, rule=StateRule.FIXED, dtype=dtype, shape=(SOURCE, width))
            for name, width in widths.items()
            if width is not None
        )

    def project(self, memory: Tensor, memory_valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return the states of a memory (B, S, M), made once: padding is zero in them, whatever it was.

        `memory_valid` (B or 1, S) is False at padding; None hides nothing.

        Raises:
            ValueError: the memory has another width than the score was made for.
        """
        if memory.shape[-1] != self.score.d_memory:
            raise ValueError(f"memory has width {memory.shape[-1]}; this attention was made for {self.score.d_memory}")
        if memory_valid is not None:  # a weight of 0 does not hide a NaN, neither here nor from the gradient
            memory = memory.masked_fill(~memory_valid[..., None], 0.0)
        if self.score.d_key is None:
            return {"memory": memory}
        return {"memory": memory, "keys": self.score.project(memory)}

    def forward(
        self,
        query: Tensor,
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Recalled:
        """Attend from query (B, T, Q) to what `project` returned; a row without valid places reads exactly zero."""
        memory = projected["memory"]
        mask = None if memory_valid is None else memory_valid[:, None]
        scores = self.score(query, projected.get("keys", memory))
        weights = self.normalizer(scores, mask).to(memory.dtype)
        return Recalled(weights @ memory, weights if need_weights else None)
