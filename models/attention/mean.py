"""Attention that looks at nothing: every token gets the mean of what it may see. The ablation of all other kinds.

Where a model with attention does no better than with this, attention was not what solved the task.

Shapes: B rows, T new tokens, S source length, E model width, M memory width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.attention.functional import allow
from models.attention.heads import Attended
from models.states import SOURCE, Chunk, StateRule, StateSpec


class MeanAttention(nn.Module):
    """The mean of all valid tokens or, if causal, of those so far, in linear time.

    Its single projection is called `output`: a projection of values before it would make one linear map with it.

    Args:
        d_model: width of input and output.
        causal: a token sees itself and what precedes it; required for a past.
        bias: the projection has a bias.
    """

    def __init__(self, d_model: int, *, causal: bool = False, bias: bool = False):
        super().__init__()
        self.output = nn.Linear(d_model, d_model, bias=bias)
        self.causal = causal

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the running sum, if causal; how many tokens it is of, their positions say."""
        if not self.causal:
            return ()
        weight = self.output.weight
        return (StateSpec(name="sum", rule=StateRule.REPLACE, dtype=_wide(weight.dtype), shape=(weight.shape[1],)),)

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Average x (B, T, E), the tokens of `chunk`, and with a past what its "sum" (B, E) holds.

        The weights are uniform, those of a single head: (B, 1, T, T).

        Raises:
            ValueError: a past is given to attention that is not causal, or weights are asked for beside one.
        """
        if past is not None and not self.causal:
            raise ValueError("a past needs causal attention: later tokens would change what earlier ones saw")
        if past is not None and need_weights:
            raise ValueError("a running sum has no weights; ask for them in a pass over the whole sequence")
        values = x.masked_fill(~chunk.valid[..., None], 0.0).to(_wide(x.dtype))
        if not self.causal:
            mean = values.sum(1, keepdim=True) / chunk.lengths.clamp(min=1)[:, None, None]
            mean = mean.expand_as(values)
        else:
            sums = values.cumsum(1)
            if past is not None:
                sums = sums + past["sum"][:, None]
            mean = sums / (chunk.positions + 1)[..., None]
        weights = None
        if need_weights:
            mask = allow(chunk.positions, chunk.positions, causal=self.causal, key_valid=chunk.valid)
            weights = _uniform(mask).to(x.dtype).expand(len(x), -1, -1, -1)
        present = {} if past is None else {"sum": past["sum"] + values.sum(1)}
        return Attended(self.output(mean.to(x.dtype)), weights, present)


class MeanCrossAttention(nn.Module):
    """The mean of a memory, the same for every query: a summary of fixed size.

    Args:
        d_model: width of the output.
        d_memory: width of the memory.
        bias: the projection has a bias.
    """

    def __init__(self, d_model: int, d_memory: int, *, bias: bool = False):
        super().__init__()
        self.output = nn.Linear(d_memory, d_model, bias=bias)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the memory, as it is."""
        weight = self.output.weight
        shape = (SOURCE, weight.shape[1])
        return (StateSpec(name="value", rule=StateRule.FIXED, dtype=weight.dtype, shape=shape),)

    def project(self, memory: Tensor) -> dict[str, Tensor]:
        """Return "value", the memory (B, S, M) itself."""
        return {"value": memory}

    def forward(
        self,
        x: Tensor,
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Attended:
        """Average a memory, of which `memory_valid` (B or 1, S) is False at padding, for each token of x (B, T, E).

        The weights are uniform, those of a single head: (B, 1, T, S).
        """
        memory = projected["value"]
        if memory_valid is None:
            memory_valid = torch.ones(1, memory.shape[1], dtype=torch.bool, device=memory.device)
        values = memory.masked_fill(~memory_valid[..., None], 0.0).to(_wide(memory.dtype))
        mean = values.sum(1) / memory_valid.sum(1).clamp(min=1)[:, None]
        output = self.output(mean.to(x.dtype))[:, None].expand(-1, x.shape[1], -1)
        weights = None
        if need_weights:
            weights = _uniform(memory_valid[:, None, None]).to(x.dtype).expand(len(x), -1, x.shape[1], -1)
        return Attended(output, weights, {})


def _uniform(mask: Tensor) -> Tensor:
    """Return weights (..., S), float32, that are alike where the mask allows and zero elsewhere."""
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to add up in: half precision loses what is small beside a long sum."""
    return torch.promote_types(dtype, torch.float32)
