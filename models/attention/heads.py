"""The projections that all multi-head attention shares: into heads, and from heads back to the model's width.

Shapes: B rows, T queries, S keys, E model width, M memory width, H query heads, K key/value heads, D head width.
"""

from typing import NamedTuple

from torch import Tensor, nn

from models.layers import RMSNorm
from models.states import Chunk

QK_NORM_EPS = 1e-6


class Attended(NamedTuple):
    """Output (B, T, E), weights (B, H, T, S) if asked for, and the next state by name if there is one."""

    output: Tensor
    weights: Tensor | None
    present: dict[str, Tensor]


class Heads(nn.Module):
    """Query, key, value and output projections; keys and values may come from a memory of another width.

    Args:
        d_model: width of input and output.
        num_heads: query heads.
        num_kv_heads: key/value heads; `num_heads` when None.
        head_dim: width of a head; d_model / num_heads when None.
        d_memory: width of what keys and values are made of; `d_model` when None.
        qk_norm: queries and keys are scaled to unit root mean square, with learned gains, before anything else
            (Henry et al., Query-Key Normalization for Transformers, 2020, arXiv:2010.04245, in the form in use today).
        qkv_bias: query, key and value have a bias.
        output_bias: the output projection has a bias.

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
        d_memory: int | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}; give head_dim")
        d_memory = d_model if d_memory is None else d_memory
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.query = nn.Linear(d_model, num_heads * self.head_dim, bias=qkv_bias)
        self.key = nn.Linear(d_memory, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.value = nn.Linear(d_memory, num_kv_heads * self.head_dim, bias=qkv_bias)
        self.output = nn.Linear(num_heads * self.head_dim, d_model, bias=output_bias)
        self.query_norm = RMSNorm(self.head_dim, QK_NORM_EPS) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, QK_NORM_EPS) if qk_norm else None

    def queries(self, x: Tensor) -> Tensor:
        """Project x (B, T, E) to (B, H, T, D)."""
        query = self._split(self.query(x), self.num_heads)
        return query if self.query_norm is None else self.query_norm(query)

    def keys(self, memory: Tensor) -> Tensor:
        """Project memory (B, S, M) to (B, K, S, D)."""
        key = self._split(self.key(memory), self.num_kv_heads)
        return key if self.key_norm is None else self.key_norm(key)

    def values(self, memory: Tensor) -> Tensor:
        """Project memory (B, S, M) to (B, K, S, D)."""
        return self._split(self.value(memory), self.num_kv_heads)

    def merge(self, context: Tensor) -> Tensor:
        """Project what the heads read, (B, H, T, D), to (B, T, E)."""
        return self.output(context.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, num_heads: int) -> Tensor:
        return x.unflatten(-1, (num_heads, self.head_dim)).transpose(1, 2)  # (B, T, H * D) -> (B, H, T, D)


def refuse_global(chunk: Chunk) -> None:
    """Raise a ValueError if `chunk` marks global tokens, for attention that would not heed them."""
    if chunk.is_global is not None:
        raise ValueError(
            "is_global marks tokens that see all others, later ones included; they need attention 'longformer', in a "
            "model that is not causal"
        )
