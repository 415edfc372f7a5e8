"""Multi-head self- and cross-attention; grouped and multi-query by the number of key/value heads.

Shapes: B rows, T new tokens, S keys, E model width, H query heads, K key/value heads, D head width, C slots.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, arange

from models.attention.functional import allow, attend, attend_causally
from models.attention.heads import Attended, Heads, refuse_global
from models.attention.normalizers import Normalizer, masked_softmax
from models.attention.positions import Rotary, alibi_bias, alibi_slopes
from models.attention.window import BLOCK, window_attend
from models.states import CAPACITY, SOURCE, Chunk, StateRule, StateSpec, append, ring_positions, ring_write

WindowState = Literal["append", "ring"]


class MultiHeadAttention(Heads):
    """Self-attention over the tokens of a chunk and, with a past, over all that came before.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        causal: a token sees itself and what precedes it; required for a past.
        rotary: rotates queries and keys at their absolute positions.
        alibi: scores fall with the distance, by a slope for each head.
        window: a token sees so many tokens, itself included, if causal; and fewer than so many to either side,
            itself aside, if not. None is no limit.
        window_state: what a windowed layer remembers: "append" keeps every position (and declares that those behind
            the window may be released), "ring" keeps the last ones in `window` slots.
        softcap: scores are squashed into (-softcap, softcap) by a hyperbolic tangent.
        normalizer: turns masked scores into weights; softmax, sparsemax or entmax15.
        dropout: on the weights, in training.
        projections: the arguments of `Heads`.

    Raises:
        ValueError: sizes do not fit, or options exclude each other.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = False,
        rotary: Rotary | None = None,
        alibi: bool = False,
        window: int | None = None,
        window_state: WindowState = "append",
        softcap: float | None = None,
        normalizer: Normalizer = masked_softmax,
        dropout: float = 0.0,
        **projections: object,
    ):
        super().__init__(d_model, num_heads, **projections)
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; it must be at least 1, the token itself")
        if window_state not in ("append", "ring"):
            raise ValueError(f"window_state is {window_state!r}; it must be append or ring")
        if window_state == "ring" and (window is None or not causal):
            raise ValueError("window_state is 'ring', which needs causal attention with a window")
        if alibi and rotary is not None:
            raise ValueError("alibi and rotary are both given; choose one kind of positions")
        self.causal = causal
        self.rotary = rotary
        self.window = window
        self.ring = window_state == "ring"
        self.softcap = softcap
        self.normalizer = normalizer
        self.dropout = dropout
        self.alibi = alibi

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare what must be remembered: keys (after rotation) and values, if causal; nothing otherwise."""
        if not self.causal:
            return ()
        rule = StateRule.RING if self.ring else StateRule.APPEND
        shape = (self.num_kv_heads, self.window if self.ring else CAPACITY, self.head_dim)
        dtype = self.key.weight.dtype
        return tuple(
            StateSpec(name=name, rule=rule, dtype=dtype, shape=shape, window=self.window) for name in ("key", "value")
        )

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`.

        With a `past` ("key" and "value", each (B, K, C, D)) the keys are its C slots with the new tokens written; of
        a ring, its C slots and then the T new tokens.

        Raises:
            ValueError: a past is given to attention that is not causal, or tokens are marked as global.
        """
        refuse_global(chunk)
        if past is not None and not self.causal:
            raise ValueError("a past needs causal attention: later tokens would change what earlier ones saw")
        query, key, value = self.queries(x), self.keys(x), self.values(x)
        positions = chunk.positions  # (B or 1, T)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        dropout = self.dropout if self.training else 0.0
        left = None if self.window is None else self.window - 1
        right = 0 if self.causal else left
        present: dict[str, Tensor] = {}
        if past is None:
            if not need_weights:
                context = self._without_scores(query, key, value, chunk.valid, dropout)
                if context is not None:
                    return Attended(self.merge(context), None, present)
            key_positions, key_valid = positions, chunk.valid
        elif self.ring:
            present = {"key": ring_write(past["key"], key, chunk), "value": ring_write(past["value"], value, chunk)}
            # The new tokens are read beside the ring, not from it: writing first would overwrite what they still see.
            held = ring_positions(chunk.start, past["key"].shape[2])
            key, value = torch.cat((past["key"], key), 2), torch.cat((past["value"], value), 2)
            rows = x.shape[0]
            key_positions = torch.cat((held.expand(rows, -1), positions.expand(rows, -1)), 1)
            key_valid = torch.cat(((held >= 0).expand(rows, -1), chunk.valid.expand(rows, -1)), 1)
        else:
            key, value = append(past["key"], key, chunk), append(past["value"], value, chunk)
            present = {"key": key, "value": value}
            key_positions = arange(key.shape[2], device=x.device)[None]  # (1, C)
            key_valid = key_positions < (chunk.start + chunk.lengths)[:, None]
        mask = allow(positions, key_positions, left=left, right=right, key_valid=key_valid)
        bias = None
        if self.alibi:
            bias = alibi_bias(alibi_slopes(self.num_heads).to(x.device), positions, key_positions).to(query.dtype)
        context, weights = attend(
            query,
            key,
            value,
            mask,
            bias=bias,
            softcap=self.softcap,
            normalizer=self.normalizer,
            dropout=dropout,
            need_weights=need_weights,
        )
        return Attended(self.merge(context), weights, present)

    def _without_scores(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor, dropout: float
    ) -> Tensor | None:
        """Read without a T x T mask where that is possible and pays; None where it is not."""
        if self.alibi or self.softcap or self.normalizer is not masked_softmax:
            return None
        if self.window is None:
            if not self.causal:
                return None
            return attend_causally(query, key, value, key_valid=valid, dropout=dropout)
        if query.shape[2] <= 4 * max(self.window, BLOCK):
            return None
        left = self.window - 1
        right = 0 if self.causal else left
        return window_attend(query, key, value, left=left, right=right, key_valid=valid, dropout=dropout)


class CrossAttention(Heads):
    """Attention from a sequence to a memory: what an encoder made of a source.

    Keys and values are made once for a memory and stay as they are; positions play no part.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        softcap: scores are squashed into (-softcap, softcap) by a hyperbolic tangent.
        normalizer: turns masked scores into weights.
        dropout: on the weights, in training.
        projections: the arguments of `Heads`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        softcap: float | None = None,
        normalizer: Normalizer = masked_softmax,
        dropout: float = 0.0,
        **projections: object,
    ):
        super().__init__(d_model, num_heads, **projections)
        self.softcap = softcap
        self.normalizer = normalizer
        self.dropout = dropout

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the keys and values of the memory."""
        shape = (self.num_kv_heads, SOURCE, self.head_dim)
        return tuple(
            StateSpec(name=name, rule=StateRule.FIXED, dtype=self.key.weight.dtype, shape=shape)
            for name in ("key", "value")
        )

    def project(self, memory: Tensor) -> dict[str, Tensor]:
        """Return "key" and "value" (B, K, S, D) of a memory (B, S, M)."""
        return {"key": self.keys(memory), "value": self.values(memory)}

    def forward(
        self,
        x: Tensor,
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Attended:
        """Attend from x (B, T, E) to a projected memory, of which `memory_valid` (B or 1, S) is False at padding."""
        mask = None if memory_valid is None else memory_valid[:, None, None, :]
        context, weights = attend(
            self.queries(x),
            projected["key"],
            projected["value"],
            mask,
            softcap=self.softcap,
            normalizer=self.normalizer,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        return Attended(self.merge(context), weights, {})
