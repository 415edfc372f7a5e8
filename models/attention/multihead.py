"""Multi-head attention with its projections; grouped and multi-query by the number of key/value heads.

Shapes: B rows, T new tokens, S keys, E model width, H query heads, K key/value heads, D head width, C slots.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, arange, nn

from models.attention.functional import allow, attend
from models.attention.positions import Rotary
from models.states import CAPACITY, Chunk, StateRule, StateSpec, append


class Attended(NamedTuple):
    """Output (B, T, E), weights (B, H, T, S) if asked for, and the next state by name if there is one."""

    output: Tensor
    weights: Tensor | None
    present: dict[str, Tensor]


class MultiHeadAttention(nn.Module):
    """Self-attention over the tokens of a chunk and, with a past, over all that came before.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads; `num_heads` when None.
        head_dim: width of a head; d_model / num_heads when None.
        causal: a token sees itself and what precedes it; required for a past.
        rotary: rotates queries and keys at their absolute positions.
        qkv_bias: query, key and value have a bias.
        output_bias: the output projection has a bias.
        dropout: on the weights, in training.

    Raises:
        ValueError: num_heads is no multiple of num_kv_heads, or d_model none of num_heads without a head_dim.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}; give head_dim")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.rotary = rotary
        self.dropout = dropout
        self.query = nn.Linear(d_model, num_heads * self.head_dim, bias=qkv_bias)
        self.key = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.value = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.output = nn.Linear(num_heads * self.head_dim, d_model, bias=output_bias)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare what must be remembered: keys (after rotation) and values, if causal; nothing otherwise."""
        if not self.causal:
            return ()
        shape = (self.num_kv_heads, CAPACITY, self.head_dim)
        return tuple(
            StateSpec(name=name, rule=StateRule.APPEND, dtype=self.key.weight.dtype, shape=shape)
            for name in ("key", "value")
        )

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`.

        With a `past` ("key" and "value", each (B, K, C, D)) the keys are its C slots with the new tokens written.

        Raises:
            ValueError: a past is given to attention that is not causal.
        """
        if past is not None and not self.causal:
            raise ValueError("a past needs causal attention: later tokens would change what earlier ones saw")
        query = self._heads(self.query(x), self.num_heads)
        key = self._heads(self.key(x), self.num_kv_heads)
        value = self._heads(self.value(x), self.num_kv_heads)
        positions = chunk.positions  # (B or 1, T)
        if self.rotary is not None:
            query, key = self.rotary(query, positions), self.rotary(key, positions)
        present: dict[str, Tensor] = {}
        if past is None:
            key_positions, key_valid = positions, chunk.valid
        else:
            key, value = append(past["key"], key, chunk), append(past["value"], value, chunk)
            present = {"key": key, "value": value}
            key_positions = arange(key.shape[2], device=x.device)[None]  # (1, C)
            key_valid = key_positions < (chunk.start + chunk.lengths)[:, None]
        mask = allow(positions, key_positions, causal=self.causal, key_valid=key_valid)
        dropout = self.dropout if self.training else 0.0
        context, weights = attend(query, key, value, mask, dropout=dropout, need_weights=need_weights)
        return Attended(self.output(context.transpose(1, 2).flatten(2)), weights, present)

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)
