"""Linear maps and embeddings of the served graph: as trained, and in 8 bits.

T rows, K inputs, N outputs. An 8-bit map rounds its input to integers, multiplies them by int8 weights with one scale
per output, and scales the exact integer sums back. Nothing depends on the other rows of a batch, so results cannot
depend on them either, and the only loss is the rounding. All maps of one module share their input, and its rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from export import operators
from export.weights import Affine

ZERO_POINT = 128
MAX_CODE = 127
# For a row of root mean square one and no outliers, close to a normal distribution: the range at which what is cut off
# and what is rounded cost least together, with 8 bits.
NORMALISED_RANGE = 4.0
# Of a balanced and mixed sample: how much of a component's size moves into the weights, and how much of the range is
# kept, which rounds the rest more finely. Chosen by the cosine of MiniLM's vectors to those in fp32.
MIGRATION = 0.6
SAMPLE_SHARE = 0.8


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
    """Integer products of rows of known size: one constant scale for all of them, and what is out of range is cut off.

    The range is by default that of rows whose root mean square is one.
    """

    def __init__(self, maps: Sequence[Affine], limit: float = NORMALISED_RANGE) -> None:
        super().__init__()
        self.maps = nn.ModuleList(_Integer(each) for each in maps)
        self.register_buffer("scale", torch.tensor(limit / MAX_CODE))
        self.register_buffer("zero_point", torch.tensor(ZERO_POINT, dtype=torch.uint8))

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        codes = operators.quantise_linear(values, self.scale, self.zero_point)
        return [
            operators.integer_matmul(codes, each.codes, (self.scale, each.scale), self.zero_point, each.bias)
            for each in self.maps
        ]


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
        self.mixing = Mixing(maps[0].weight.shape[1])
        self.linear = RowScaledLinear([replace(each, weight=self.mixing(each.weight)) for each in maps])

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        return self.linear(self.mixing(values))


class BalancedLinear(nn.Module):
    """A map of constant scale, for rows of similar size, such as a layer norm makes.

    Components are brought to similar sizes by a factor each, which is undone in the weights (Xiao et al., SmoothQuant,
    2022, arXiv:2211.10438), then mixed in small blocks.

    Args:
        maps: those that share the input.
        sample: inputs [T, K] of an ordinary text, by which factors and range are chosen.
    """

    def __init__(self, maps: Sequence[Affine], sample: Tensor) -> None:
        super().__init__()
        factor = _balance(sample, maps)
        self.mixing = Mixing(sample.shape[1])
        weights = [self.mixing(each.weight / factor) for each in maps]
        limit = SAMPLE_SHARE * float(self.mixing(sample * factor).abs().max())
        self.register_buffer("factor", factor)
        self.linear = FixedRangeLinear(
            [replace(each, weight=weight) for each, weight in zip(maps, weights, strict=True)], limit
        )

    def forward(self, values: Tensor) -> list[Tensor]:
        """Map [T, K] to one [T, N] for each map."""
        return self.linear(self.mixing(values * self.factor))


class Mixing(nn.Module):
    """The product of every block of a row with an orthogonal, symmetric matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = next(size for size in (16, 8, 4, 2, 1) if width % size == 0)
        self.register_buffer("matrix", hadamard(self.block))

    def forward(self, values: Tensor) -> Tensor:
        """Map [T, K] to [T, K]."""
        return nn.functional.linear(values.reshape(-1, self.block), self.matrix).reshape(-1, values.shape[1])


def _balance(sample: Tensor, maps: Sequence[Affine]) -> Tensor:
    """Return the factors [K] of components: the larger one is and the smaller its weights, the smaller its factor."""
    # The fourth power: rare large values count for more than in a root mean square, for less than as a maximum.
    size = sample.pow(4).mean(dim=0).pow(0.25)
    weight = torch.cat([each.weight for each in maps]).abs().amax(dim=0)
    # A component that is never active, or never read, must not blow up.
    size, weight = (each.clamp(min=1e-3 * float(each.max()) or 1.0) for each in (size, weight))
    return weight ** (1 - MIGRATION) / size**MIGRATION


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
