"""Linear maps and embeddings of the served graph: as trained, and in 8 bits.

T rows, K inputs, N outputs. An 8-bit map rounds its input to integers, multiplies them by int8 weights with one scale
per output, and scales the exact integer sums back. Nothing depends on the other rows of a batch, so results cannot
depend on them either, and the only loss is the rounding. All maps of one module share their input, and its rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export import operators
from export.weights import Affine

ZERO_POINT = 128
MAX_CODE = 127
# For a row of root mean square one and no outliers, close to a normal distribution: the range at which what is cut off
# and what is rounded cost least together, with 8 bits.
NORMALISED_RANGE = 4.0


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [N, K] to int8, symmetrically, with one scale per output.

    Returns:
        Codes int8 [N, K] in [-127, 127] and scales float32 [N]; an output of zeros has the scale one.
    """
    scale = weight.abs().amax(dim=1) / MAX_CODE
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale[:, None]).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8), scale


def hadamard(size: int) -> Tensor:
    """Return the orthogonal, symmetric Hadamard matrix of a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


class FloatLinear(nn.Module):
    """Float32 products."""

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_Float(each) for each in maps)

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        return [nn.functional.linear(values, each.weight, each.bias) for each in self.maps]


class FixedRangeLinear(nn.Module):
    """Integer products of rows whose root mean square is known to be one: one constant scale for all of them."""

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_Integer(each) for each in maps)
        self.register_buffer("scale", torch.tensor(NORMALISED_RANGE / MAX_CODE))
        self.register_buffer("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        codes = operators.quantise_linear(values, self.scale, self.zero_point)
        results = (
            operators.integer_matmul(codes, each.codes, (self.scale, each.scale), self.zero_point) for each in self.maps
        )
        return [each.add_bias(result) for each, result in zip(self.maps, results, strict=True)]


class RowScaledLinear(nn.Module):
    """Integer products of rows of any size: each row x has its own scale, max|x| / 127."""

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_Integer(each) for each in maps)
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("step", torch.tensor(1 / MAX_CODE))
        self.register_buffer("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        scale = values.abs().amax(dim=1) * self.step
        zero_points = self.zero_point.expand(values.shape[0])
        # A row of zeros divides by zero; whatever code results is multiplied by its scale, zero.
        codes = operators.quantise_linear(values, scale, zero_points)
        results = (
            operators.integer_matmul(codes, each.codes, (self.one, each.scale), self.zero_point) * scale[:, None]
            for each in self.maps
        )
        return [each.add_bias(result) for each, result in zip(self.maps, results, strict=True)]


class MixedLinear(nn.Module):
    """A row-scaled map whose inputs are first mixed in small blocks, which spreads a lone large value over its block.

    The mixing is orthogonal and undone in the weights. It is for inputs that no rewriting of weights can rotate, such
    as the product of a gated activation (Ashkboos et al., QuaRot, 2024, arXiv:2404.00456).
    """

    def __init__(self, maps: Sequence[Affine]) -> None:
        super().__init__()
        width = maps[0].weight.shape[1]
        self.block = next(size for size in (16, 8, 4, 2, 1) if width % size == 0)
        self.register_buffer("mixing", hadamard(self.block))
        self.linear = RowScaledLinear([Affine(weight=self._mix(each.weight), bias=each.bias) for each in maps])

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        return self.linear(self._mix(values))

    def _mix(self, values: Tensor) -> Tensor:
        return nn.functional.linear(values.reshape(-1, self.block), self.mixing).reshape(-1, values.shape[1])


class FloatEmbedding(nn.Module):
    """Rows of a float32 table [V, E]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, index: Tensor) -> Tensor:
        """Return rows [T, E] for indices [T]."""
        return self.table.index_select(0, index)


class IntegerEmbedding(nn.Module):
    """Rows of an int8 table [V, E] with one scale per row."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        codes, scale = quantise_weight(table)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale[:, None])

    def forward(self, index: Tensor) -> Tensor:
        """Return rows [T, E] for indices [T]."""
        return self.codes.index_select(0, index).float() * self.scale.index_select(0, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Which module computes what, by what is known of the input."""

    embedding: Callable[[Tensor], nn.Module]
    normalised: Callable[[Sequence[Affine]], nn.Module]  # rows of root mean square one
    context: Callable[[Sequence[Affine]], nn.Module]  # what attention returns
    hidden: Callable[[Sequence[Affine]], nn.Module]  # the inside of a feed-forward block
    logits: Callable[[Sequence[Affine]], nn.Module]  # rows of root mean square one, unless something went wrong


FLOAT_KERNELS = Kernels(
    embedding=FloatEmbedding, normalised=FloatLinear, context=FloatLinear, hidden=FloatLinear, logits=FloatLinear
)
# A constant range rounds NaN to some code; a row's own scale keeps it, so that logits show that a row has failed.
INTEGER_KERNELS = Kernels(
    embedding=IntegerEmbedding,
    normalised=FixedRangeLinear,
    context=RowScaledLinear,
    hidden=MixedLinear,
    logits=RowScaledLinear,
)
# Where no weights are rewritten: every input is mixed, since the norms' gains make lone large values in any of them.
MIXED_KERNELS = Kernels(
    embedding=FloatEmbedding,
    normalised=MixedLinear,
    context=MixedLinear,
    hidden=MixedLinear,
    logits=MixedLinear,
)


class _Float(nn.Module):
    """The tensors of a float map."""

    def __init__(self, each: Affine) -> None:
        super().__init__()
        self.register_buffer("weight", each.weight)
        self.register_buffer("bias", each.bias)


class _Integer(nn.Module):
    """The tensors of an integer map: `codes` int8 [K, N], `scale` [N]."""

    def __init__(self, each: Affine) -> None:
        super().__init__()
        codes, scale = quantise_weight(each.weight)
        self.register_buffer("codes", codes.T.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", each.bias)

    def add_bias(self, result: Tensor) -> Tensor:
        """Return `result` [T, N] plus the bias, if there is one."""
        return result if self.bias is None else operators.add(result, self.bias)
