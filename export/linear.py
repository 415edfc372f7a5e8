"""Linear maps of the served graph: as trained, and row-scaled 8 bit.

T rows, K inputs, N outputs. Row-scaled means: every row x of the input has its own scale s = max|x| / 127, and the
integers round(x / s) + 128 are multiplied by int8 weights with one scale per output. The sums are exact, so a row's
result cannot depend on the rows beside it, and the only loss is the rounding itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export import operators
from export.weights import Affine

ZERO_POINT = 128
MAX_CODE = 127


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to int8, symmetrically, with one scale per output.

    Returns:
        Codes int8 [K, N] in [-127, 127] and scales float32 [N]; an output without weights has the scale one.
    """
    largest = weight.abs().amax(dim=1).double()
    scale = torch.where(largest > 0, largest / MAX_CODE, 1.0).float()
    codes = (weight.double() / scale.double()[:, None]).round().clamp(-MAX_CODE, MAX_CODE)
    return codes.to(torch.int8).T.contiguous(), scale


class FloatLinear(nn.Module):
    """One float32 matrix product for all maps that share an input."""

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        # One map keeps its own tensor, so that a tied embedding is stored once.
        weight = maps[0].weight if len(maps) == 1 else torch.cat([each.weight for each in maps])
        self.register_buffer("weight", weight)
        self.register_buffer("bias", _join_biases(maps))

    def forward(self, values: Tensor) -> Tensor:
        """Map [T, K] to [T, N], the outputs of all maps side by side."""
        return nn.functional.linear(values, self.weight, self.bias)


class RowScaledLinear(nn.Module):
    """One integer matrix product for all maps that share an input."""

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        codes, scale = quantise_weight(torch.cat([each.weight for each in maps]))
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("step", torch.tensor(1 / MAX_CODE))
        self.register_buffer("bias", _join_biases(maps))

    def forward(self, values: Tensor) -> Tensor:
        """Map [T, K] to [T, N], the outputs of all maps side by side."""
        row_scale = values.abs().amax(dim=1) * self.step
        zero_points = self.zero_point.expand(values.shape[0])
        # A row of zeros divides by zero; whatever code results is multiplied by its scale, zero.
        codes = operators.quantise_linear(values, row_scale, zero_points, axis=0)
        result = operators.integer_matmul(codes, self.codes, (self.one, self.scale), self.zero_point)
        result = result * row_scale[:, None]
        return result if self.bias is None else result + self.bias


def _join_biases(maps: Sequence[Affine]) -> Tensor | None:
    """Side by side; a map without a bias among others that have one contributes zeros."""
    if all(each.bias is None for each in maps):
        return None
    parts = [torch.zeros(len(each.weight)) if each.bias is None else each.bias for each in maps]
    return torch.cat(parts)
