"""PyTorch's GRU as ONNX's own operator, which takes any length; PyTorch itself would trace one length, or a loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic_multi_out

from export.operators import OPSET


class OnnxGRU(nn.Module):
    """One direction of one layer, batch first. As all operators of this room, it computes nothing in PyTorch.

    ONNX orders the gates update, reset, candidate; PyTorch has reset first. B rows, S tokens, E inputs, H hidden.
    """

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        assert gru.num_layers == 1 and not gru.bidirectional and gru.batch_first and gru.bias

        def ordered(parameter: Tensor) -> Tensor:
            reset, update, candidate = parameter.detach().chunk(3)
            return torch.cat((update, reset, candidate))

        self.hidden_size = gru.hidden_size
        self.register_buffer("weight", ordered(gru.weight_ih_l0)[None])
        self.register_buffer("recurrence", ordered(gru.weight_hh_l0)[None])
        self.register_buffer("bias", torch.cat((ordered(gru.bias_ih_l0), ordered(gru.bias_hh_l0)))[None])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return all hidden states [B, S, H] of x [B, S, E], and the last ones [1, B, H]."""
        rows, tokens, _ = x.shape
        states, last = symbolic_multi_out(
            "GRU",
            (x.transpose(0, 1), self.weight, self.recurrence, self.bias),
            {"hidden_size": self.hidden_size, "linear_before_reset": 1},
            dtypes=(torch.float32, torch.float32),
            shapes=((tokens, 1, rows, self.hidden_size), (1, rows, self.hidden_size)),
            version=OPSET,
        )
        return states.squeeze(1).transpose(0, 1), last


@contextmanager
def onnx_grus(model: nn.Module) -> Iterator[None]:
    """Put `OnnxGRU` in the place of every GRU of a model for as long as it is traced."""
    replaced = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.GRU)
    ]
    for parent, name, child in replaced:
        setattr(parent, name, OnnxGRU(child))
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)
