"""The layer that every Transformer here is stacked from: attention, perhaps to a memory as well, and feed-forward.

Shapes: B rows, T new tokens, S source length, E model width, H heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from models.attention.heads import Attended
from models.layers import FeedForward
from models.states import Chunk, StateSpec

CROSS = "cross."
"""Prefix of a layer's states that belong to its cross-attention."""


class SelfAttention(Protocol):
    """What a layer asks of its self-attention, whatever its mechanism."""

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare what must be remembered between steps."""

    def __call__(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Attend from x (B, T, E), the tokens of `chunk`, to themselves and to the past."""


class AttentionToMemory(Protocol):
    """What a layer asks of its cross-attention."""

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare what is made of a memory."""

    def project(self, memory: Tensor) -> dict[str, Tensor]:
        """Return what is made of a memory (B, S, M), by the declared names."""

    def __call__(
        self,
        x: Tensor,
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Attended:
        """Attend from x (B, T, E) to a projected memory, of which `memory_valid` (B or 1, S) is False at padding."""


class LayerOutput(NamedTuple):
    """x (B, T, E), both kinds of weights if asked for, and the next state by name if there is one."""

    x: Tensor
    weights: Tensor | None
    cross_weights: Tensor | None
    present: dict[str, Tensor]


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention if given, and a feed-forward block, each around a residual connection.

    Args:
        attention: any `SelfAttention` that is a module.
        cross_attention: any `AttentionToMemory` that is a module, or None.
        feed_forward: maps (B, T, E) to (B, T, E).
        norms: one norm for each of the two or three blocks, in their order.
        norm_first: x + f(norm(x)); otherwise norm(x + f(x)) as in Vaswani et al., 2017 (the difference: Xiong et al.,
            On Layer Normalization in the Transformer Architecture, 2020, arXiv:2002.04745).
        dropout: on what each block adds, in training.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: FeedForward,
        norms: list[nn.Module],
        *,
        cross_attention: nn.Module | None = None,
        norm_first: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.attention_norm = norms[0]
        self.attention = attention
        self.cross_attention_norm = norms[1] if cross_attention is not None else None
        self.cross_attention = cross_attention
        self.feed_forward_norm = norms[-1]
        self.feed_forward = feed_forward
        self.norm_first = norm_first
        self.dropout = nn.Dropout(dropout)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the states of the self-attention, and those of the cross-attention with the prefix "cross."."""
        if self.cross_attention is None:
            return self.attention.state_specs()
        crossed = (replace(spec, name=CROSS + spec.name) for spec in self.cross_attention.state_specs())
        return (*self.attention.state_specs(), *crossed)

    def project(self, memory: Tensor) -> dict[str, Tensor]:
        """Return the fixed states that a memory (B, S, M) gives this layer."""
        assert self.cross_attention is not None, "a layer without cross-attention is given no memory"
        return {CROSS + name: tensor for name, tensor in self.cross_attention.project(memory).items()}

    def forward(
        self,
        x: Tensor,
        chunk: Chunk,
        past: Mapping[str, Tensor] | None = None,
        projected: Mapping[str, Tensor] | None = None,
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
        need_cross_weights: bool = False,
    ) -> LayerOutput:
        """Map x (B, T, E) to the next layer's input.

        Args:
            x: the tokens of `chunk`.
            chunk: their positions.
            past: states of the self-attention; None keeps nothing.
            projected: what `project` returned; needed by a layer with cross-attention.
            memory_valid: (B or 1, S) booleans, False for padding of the memory.
            need_weights: also return the attention weights.
            need_cross_weights: also return those of the cross-attention alone.
        """
        attended = self.attention(self._before(x, self.attention_norm), chunk, past, need_weights=need_weights)
        x = self._after(x, attended.output, self.attention_norm)
        cross_weights = None
        if self.cross_attention is not None:
            made = {spec.name: projected[CROSS + spec.name] for spec in self.cross_attention.state_specs()}
            query = self._before(x, self.cross_attention_norm)
            crossed = self.cross_attention(
                query, made, memory_valid, need_weights=need_weights or need_cross_weights
            )  # fmt: skip
            x = self._after(x, crossed.output, self.cross_attention_norm)
            cross_weights = crossed.weights
        x = self._after(x, self.feed_forward(self._before(x, self.feed_forward_norm)), self.feed_forward_norm)
        return LayerOutput(x, attended.weights, cross_weights, attended.present)

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.norm_first else x

    def _after(self, x: Tensor, added: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(added)
        return x if self.norm_first else norm(x)
