"""Layers that the served graphs of decoders and encoders share. T rows, E model width."""

from torch import Tensor, nn

from export import operators
from export.weights import NormWeights


class Norm(nn.Module):
    """An RMS norm, or with a bias a layer norm."""

    def __init__(self, norm: NormWeights, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("gain", norm.gain)
        self.register_buffer("bias", norm.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [T, E]."""
        return operators.norm(hidden, self.gain, self.bias, self.eps)

    def after(self, update: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Add `update` to the residual stream `hidden`; return the sum, normalised and as it is."""
        return operators.skip_norm(update, hidden, self.gain, self.bias, self.eps)


def activate(activation: str, hidden: Tensor, up: Tensor | None = None) -> Tensor:
    """Apply a feed-forward block's activation to [T, F]; "swiglu" gates `up` with it."""
    match activation:
        case "swiglu":
            return operators.silu(hidden) * up
        case "gelu":
            return nn.functional.gelu(hidden)
        case "gelu_tanh":
            return nn.functional.gelu(hidden, approximate="tanh")
        case "relu":
            return nn.functional.relu(hidden)
        case unknown:
            raise ValueError(f"activation is {unknown!r}: export knows swiglu, gelu, gelu_tanh and relu")
