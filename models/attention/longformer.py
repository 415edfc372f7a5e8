"""Longformer attention: a sliding window for all tokens, and a few global ones that see, and are seen by, all others.

Shapes: B rows, T tokens, U the most global tokens of a row, E model width, H query heads, K key/value heads, D head
width.
Source: Beltagy, Peters and Cohan, Longformer, 2020, arXiv:2004.05150.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, arange, nn

from models.attention.functional import allow, attend
from models.attention.heads import Attended, Heads
from models.attention.positions import Rotary
from models.attention.window import SharedKeys, window_attend
from models.states import Chunk, StateSpec


class LongformerAttention(Heads):
    """Bidirectional self-attention in time and memory that grow with T * (window + U), not with T * T.

    Which tokens are global, `Chunk.is_global` says. They attend by projections of their own; others that attend to them
    use the common ones. It cannot be causal: a global token tells all others what came later.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        window: even; a token sees half of it before itself, half of it after, and itself.
        rotary: rotates queries and keys at their absolute positions.
        dropout: on the weights, in training.
        projections: the arguments of `Heads`.

    Raises:
        ValueError: sizes do not fit, or the window is not even.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        window: int,
        rotary: Rotary | None = None,
        dropout: float = 0.0,
        **projections: object,
    ):
        super().__init__(d_model, num_heads, **projections)
        if window < 2 or window % 2:
            raise ValueError(f"window is {window}; it must be even and at least 2: half of it lies to either side")
        self.side = window // 2
        self.rotary = rotary
        self.dropout = dropout
        self.global_query, self.global_key, self.global_value = (
            nn.Linear(local.in_features, local.out_features, bias=local.bias is not None)
            for local in (self.query, self.key, self.value)
        )

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare nothing: what is not causal is not decoded step by step."""
        return ()

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`. Padding reads exactly zero.

        Weights are (B, H, T, T); asking for them costs time and memory that grow with T * T.

        Raises:
            ValueError: a past is given.
        """
        if past is not None:
            raise ValueError("a past needs causal attention, but global tokens see later ones; use 'softmax' instead")
        positions, valid = chunk.positions.expand(len(x), -1), chunk.valid.expand(len(x), -1)
        is_global = torch.zeros_like(valid) if chunk.is_global is None else chunk.is_global & valid
        dropout = self.dropout if self.training else 0.0
        query, key, value = self.queries(x), self.keys(x), self.values(x)
        query, key = self._rotate(query, positions), self._rotate(key, positions)
        counts = is_global.sum(1)
        index = is_global.int().argsort(dim=1, descending=True, stable=True)[
            :, : max(counts.tolist(), default=0)
        ]  # (B, U)
        present = arange(index.shape[1], device=x.device) < counts[:, None]
        if need_weights:
            mask = allow(positions, positions, left=self.side, right=self.side) | is_global[:, None, None, :]
            mask = mask & valid[:, None, None, :] & valid[:, None, :, None]
            context, weights = attend(query, key, value, mask, dropout=dropout, need_weights=True)
        else:
            # A global key is seen once: among the shared ones, not in the window.
            context, weights = (
                window_attend(
                    query,
                    key,
                    value,
                    left=self.side,
                    right=self.side,
                    key_valid=valid & ~is_global,
                    shared=SharedKeys(_pick(key, index), _pick(value, index), present),
                    dropout=dropout,
                ).masked_fill(~valid[:, None, :, None], 0.0),
                None,
            )
        if index.shape[1]:
            marked = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))  # (B, U, E)
            query = self._rotate(self._split(self.global_query(marked), self.num_heads), positions.gather(1, index))
            key = self._rotate(self._split(self.global_key(x), self.num_kv_heads), positions)
            value = self._split(self.global_value(x), self.num_kv_heads)
            read, read_weights = attend(
                query, key, value, valid[:, None, None, :], dropout=dropout, need_weights=need_weights
            )
            context = _put(context, read, index, present)
            weights = _put(weights, read_weights, index, present) if need_weights else None
        return Attended(self.merge(context), weights, {})

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary(x, positions)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of x (B, H, T, D) at `index` (B, U): (B, H, U, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _put(x: Tensor, new: Tensor, index: Tensor, present: Tensor) -> Tensor:
    """Return x (B, H, T, D) with `new` (B, H, U, D) at `index` (B, U) where `present` (B, U)."""
    new = torch.where(present[:, None, :, None], new, _pick(x, index))
    return x.scatter(2, index[:, None, :, None].expand_as(new), new)
