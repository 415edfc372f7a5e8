"""Decoders in half precision, and the same numbers held in float32: what the exporter compares them with.

Half is IEEE half (fp16) or bfloat16 (bf16). Not only weights are rounded but every table of a graph, the cosines and
sines of positions too, so that a decoder held in float32 computes with exactly the numbers of the half graph.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from export.errors import ExportRefused
from models.attention.positions import Rotary, SinusoidalPositions
from models.decoder import Decoder

HALF_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""By precision."""


def half_decoder(decoder: Decoder, precision: str) -> Decoder:
    """Return a decoder rounded to a half type; tensors that have that type already are shared.

    Raises:
        ExportRefused: a weight is too large for the type.
    """
    dtype = HALF_TYPES[precision]
    weights = {}
    for name, tensor in decoder.weights().items():
        weights[name] = tensor.to(dtype)
        if not weights[name].isfinite().all():
            raise ExportRefused(
                f"precision is {precision!r}: {name} holds {float(tensor.abs().max()):.3g}, and the largest number of"
                f" that type is {torch.finfo(dtype).max:.3g}; choose bf16 if it is finite"
            )
    rounded = Decoder.from_weights(decoder.config, weights)
    _round_tables(rounded, dtype)
    return rounded


def first_layers(half: Decoder, num_layers: int) -> Decoder:
    """Return the first layers of a half decoder as one in float32."""
    dropped = tuple(f"layers.{index}." for index in range(num_layers, half.config.num_layers))
    weights = {name: tensor.float() for name, tensor in half.weights().items() if not name.startswith(dropped)}
    wide = Decoder.from_weights(replace(half.config, num_layers=num_layers), weights)
    _round_tables(wide, half.token_embedding.weight.dtype)
    return wide


def streamed(half: Decoder) -> Decoder:
    """Return a half decoder that computes in float32, and holds only one layer at a time so: for large ones."""
    wide = first_layers(half, 1)
    wide.layers = nn.ModuleList(_Widened(layer) for layer in half.layers)
    return wide


class _Widened(nn.Module):
    """A layer that becomes float32 when it is called, and is forgotten."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: object) -> object:
        return copy.deepcopy(self.layer).float()(*given)


def _round_tables(decoder: Decoder, dtype: torch.dtype) -> None:
    if isinstance(decoder.position_embedding, SinusoidalPositions):
        decoder.position_embedding = _RoundedSinusoids(decoder.config.d_model, dtype)
    for layer in decoder.layers:
        if layer.attention.rotary is not None:
            layer.attention.rotary = _RoundedRotary(layer.attention.rotary, dtype)


class _RoundedRotary(Rotary):
    """Rotary positions with rounded tables."""

    def __init__(self, exact: Rotary, dtype: torch.dtype) -> None:
        super().__init__(exact.rotary_dim, theta=exact.theta, interleaved=exact.interleaved)
        self.dtype = dtype

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = super().angles(positions)
        return cosines.to(self.dtype).float(), sines.to(self.dtype).float()


class _RoundedSinusoids(SinusoidalPositions):
    """Sinusoids of a rounded table."""

    def __init__(self, d_model: int, dtype: torch.dtype) -> None:
        super().__init__(d_model)
        self.dtype = dtype

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions).to(self.dtype).float()
