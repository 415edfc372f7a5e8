"""The parts of a recurrent encoder-decoder: a bidirectional encoder, and the decoder cells of Bahdanau and of Luong.

The cells differ in when they look. Bahdanau's attends with the state before the step, and what it reads enters the
step; Luong's attends with the state after the step, and what it says there enters the next (input feeding).

Shapes: B rows, S source tokens, E embedding width, M memory width, H decoder width. Source: Bahdanau, Cho and Bengio,
2014, arXiv:1409.0473; Luong, Pham and Manning, 2015, arXiv:1508.04025.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention.memory import MemoryAttention


class BidirectionalGRU(nn.Module):
    """Reads a text forwards and backwards; each place of the memory knows both sides.

    The backward reading begins at the last real token of each row, so that padding changes nothing, and a row without
    any is all zero.

    Args:
        d_input: E.
        d_hidden: width of either direction; the memory is twice as wide.
    """

    def __init__(self, d_input: int, d_hidden: int):
        super().__init__()
        self.onward = nn.GRU(d_input, d_hidden, batch_first=True)
        self.returning = nn.GRU(d_input, d_hidden, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Map x (B, S, E), of which the first `lengths` (B or 1,) of each row are real, to the memory (B, S, M)."""
        rows, num_tokens, _ = x.shape
        if num_tokens == 0 or rows == 0:
            return x.new_zeros(rows, num_tokens, 2 * self.onward.hidden_size)
        places = torch.arange(num_tokens, device=x.device)
        valid = places < lengths[:, None]  # (B or 1, S)
        # Turning the real tokens round and leaving padding where it is undoes itself.
        turned = torch.where(valid, lengths[:, None] - 1 - places, places)[..., None].expand(rows, -1, -1)
        backward, _ = self.returning(x.gather(1, turned.expand(-1, -1, x.shape[2])))
        onward, _ = self.onward(x)
        memory = torch.cat((onward, backward.gather(1, turned.expand(-1, -1, backward.shape[2]))), 2)
        return memory.masked_fill(~valid[..., None], 0.0)


class Step(NamedTuple):
    """What a cell says (B, H), its next states by name, and the weights (B, 1, S) if asked for."""

    output: Tensor
    present: dict[str, Tensor]
    weights: Tensor | None


class BahdanauCell(nn.Module):
    """c_t = attend(s_{t-1}); s_t = GRU([y_{t-1}; c_t], s_{t-1}); it says tanh(W [s_t; c_t; y_{t-1}]).

    Args:
        d_input: E.
        d_hidden: H.
        attention: to the memory, with queries of width H.
    """

    state_names = ("hidden",)

    def __init__(self, d_input: int, d_hidden: int, attention: MemoryAttention):
        super().__init__()
        d_memory = attention.score.d_memory
        self.attention = attention
        self.cell = nn.GRUCell(d_input + d_memory, d_hidden)
        self.output = nn.Linear(d_hidden + d_memory + d_input, d_hidden)

    def forward(
        self,
        x: Tensor,
        past: Mapping[str, Tensor],
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Step:
        """Take one step on x (B, E) from the "hidden" (B, H) of `past`."""
        context, weights = self.attention(past["hidden"][:, None], projected, memory_valid, need_weights=need_weights)
        context = context.squeeze(1)
        hidden = self.cell(torch.cat((x, context), 1), past["hidden"])
        output = torch.tanh(self.output(torch.cat((hidden, context, x), 1)))
        return Step(output, {"hidden": hidden}, weights)


class LuongCell(nn.Module):
    """s_t = GRU([y_{t-1}; h~_{t-1}], s_{t-1}); c_t = attend(s_t); it says h~_t = tanh(W [c_t; s_t]).

    Args:
        d_input: E.
        d_hidden: H, also that of the attentional vector h~.
        attention: to the memory, with queries of width H.
    """

    state_names = ("hidden", "attentional")

    def __init__(self, d_input: int, d_hidden: int, attention: MemoryAttention):
        super().__init__()
        self.attention = attention
        self.cell = nn.GRUCell(d_input + d_hidden, d_hidden)
        self.output = nn.Linear(attention.score.d_memory + d_hidden, d_hidden)

    def forward(
        self,
        x: Tensor,
        past: Mapping[str, Tensor],
        projected: Mapping[str, Tensor],
        memory_valid: Tensor | None = None,
        *,
        need_weights: bool = False,
    ) -> Step:
        """Take one step on x (B, E) from the "hidden" and the "attentional" vector, each (B, H), of `past`."""
        hidden = self.cell(torch.cat((x, past["attentional"]), 1), past["hidden"])
        context, weights = self.attention(hidden[:, None], projected, memory_valid, need_weights=need_weights)
        attentional = torch.tanh(self.output(torch.cat((context.squeeze(1), hidden), 1)))
        return Step(attentional, {"hidden": hidden, "attentional": attentional}, weights)


CELLS: dict[str, type[BahdanauCell] | type[LuongCell]] = {"bahdanau": BahdanauCell, "luong": LuongCell}
