"""Rewriting a decoder's weights so that 8 bits hold its activations; what it computes stays the same.

Rounding a row to 8 bits is lossy in proportion to how far its largest value stands out. So norms are reduced to RMS
norms without a gain, the residual stream and the values are rotated, which spreads every outlier over all components,
and scales move from wild activations into the weights behind them.

Sources: Ashkboos et al., SliceGPT, 2024, arXiv:2401.15024 (norms); Ashkboos et al., QuaRot, 2024, arXiv:2404.00456
(rotations); Xiao et al., SmoothQuant, 2022, arXiv:2211.10438 (scales).

E model width, N query heads, K key/value heads, G = N / K, D head width, F feed-forward width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.weights import Affine, DecoderWeights, LayerWeights, NormWeights

# How much of an activation's spread moves into the weights: 0 none, 1 all. Chosen on calibration text by output error.
VALUE_MIGRATION = 0.6
HIDDEN_MIGRATION = 0.7
_SEED = 20_240_404


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """Root mean squares over a text of the inputs of a layer's output [N * D] and down [F] projections."""

    context: Tensor
    hidden: Tensor


def prepare_for_rounding(weights: DecoderWeights, sizes: tuple[LayerSizes, ...]) -> DecoderWeights:
    """Return weights that compute the same and whose activations round well.

    The result has RMS norms with a gain of one, so every normalised row has a root mean square of one.

    Args:
        weights: of a decoder.
        sizes: measured on that decoder, one for each layer.
    """
    weights = _absorb_norms(_without_means(weights))
    layers = tuple(
        _rotate_values(_scale_values(_scale_hidden(layer, size, weights), size, weights), weights, index)
        for index, (layer, size) in enumerate(zip(weights.layers, sizes, strict=True))
    )
    return _rotate_residual(replace(weights, layers=layers))


def random_rotation(size: int, seed: int) -> Tensor:
    """Return an orthogonal matrix [size, size], the same for the same seed; made in float64, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(gaussian)
    return (orthogonal * triangular.diagonal().sign()).float()


def _without_means(weights: DecoderWeights) -> DecoderWeights:
    """Turn layer norms into RMS norms: if nothing writes a mean to the residual stream, none has to be removed."""
    if weights.final_norm.bias is None:
        return weights

    def centre(each: Affine) -> Affine:
        weight = each.weight - each.weight.mean(dim=0, keepdim=True)
        return Affine(weight=weight, bias=None if each.bias is None else each.bias - each.bias.mean())

    def centre_rows(table: Tensor) -> Tensor:
        return table - table.mean(dim=1, keepdim=True)

    return replace(
        weights,
        token_embedding=centre_rows(weights.token_embedding),
        positions=None if weights.positions is None else centre_rows(weights.positions),
        layers=tuple(replace(layer, output=centre(layer.output), down=centre(layer.down)) for layer in weights.layers),
    )


def _absorb_norms(weights: DecoderWeights) -> DecoderWeights:
    """Move the gain and bias of every norm into the maps behind it."""
    plain = NormWeights(gain=torch.ones_like(weights.final_norm.gain))

    def absorb(each: Affine, norm: NormWeights) -> Affine:
        bias = each.bias
        if norm.bias is not None:
            shift = each.weight @ norm.bias
            bias = shift if bias is None else bias + shift
        return Affine(weight=each.weight * norm.gain, bias=bias)

    def layer_without_norms(layer: LayerWeights) -> LayerWeights:
        before_attention, before_feed_forward = layer.attention_norm, layer.feed_forward_norm
        return replace(
            layer,
            attention_norm=plain,
            query=absorb(layer.query, before_attention),
            key=absorb(layer.key, before_attention),
            value=absorb(layer.value, before_attention),
            feed_forward_norm=plain,
            gate=None if layer.gate is None else absorb(layer.gate, before_feed_forward),
            up=absorb(layer.up, before_feed_forward),
        )

    return replace(
        weights,
        layers=tuple(layer_without_norms(layer) for layer in weights.layers),
        final_norm=plain,
        lm_head=absorb(weights.lm_head, weights.final_norm),
    )


def _rotate_residual(weights: DecoderWeights) -> DecoderWeights:
    """Rotate the residual stream: an RMS norm without a gain does not notice."""
    rotation = random_rotation(weights.config.d_model, _SEED)

    def read(each: Affine) -> Affine:
        return Affine(weight=each.weight @ rotation, bias=each.bias)

    def write(each: Affine) -> Affine:
        bias = None if each.bias is None else each.bias @ rotation
        return Affine(weight=rotation.T @ each.weight, bias=bias)

    def rotate(layer: LayerWeights) -> LayerWeights:
        return replace(
            layer,
            query=read(layer.query),
            key=read(layer.key),
            value=read(layer.value),
            output=write(layer.output),
            gate=None if layer.gate is None else read(layer.gate),
            up=read(layer.up),
            down=write(layer.down),
        )

    return replace(
        weights,
        token_embedding=weights.token_embedding @ rotation,
        positions=None if weights.positions is None else weights.positions @ rotation,
        layers=tuple(rotate(layer) for layer in weights.layers),
        lm_head=read(weights.lm_head),
    )


def _rotate_values(layer: LayerWeights, weights: DecoderWeights, index: int) -> LayerWeights:
    """Rotate each head's values, and rotate back in the output projection: attention only averages values."""
    config = weights.config
    rotation = random_rotation(config.head_dim, _SEED + 1 + index)
    value = layer.value.weight.unflatten(0, (config.num_kv_heads, config.head_dim))  # [K, D, E]
    output = layer.output.weight.unflatten(1, (config.num_heads, config.head_dim))  # [E, N, D]
    bias = layer.value.bias
    if bias is not None:
        bias = (bias.unflatten(0, (config.num_kv_heads, config.head_dim)) @ rotation).flatten()
    return replace(
        layer,
        value=Affine(weight=(rotation.T @ value).flatten(0, 1), bias=bias),
        output=replace(layer.output, weight=(output @ rotation).flatten(1)),
    )


def _scale_values(layer: LayerWeights, sizes: LayerSizes, weights: DecoderWeights) -> LayerWeights:
    """Even out the components of the values, alike for the G query heads that read the same ones."""
    config = weights.config
    heads = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    size = sizes.context.unflatten(0, heads).square().mean(dim=1).sqrt()  # [K, D]
    largest = layer.output.weight.abs().amax(dim=0).unflatten(0, heads).amax(dim=1)
    scale = _migration(size, largest, VALUE_MIGRATION)
    per_head = scale[:, None].expand(heads).flatten()
    return replace(
        layer,
        value=_shrink_outputs(layer.value, scale.flatten()),
        output=replace(layer.output, weight=layer.output.weight * per_head),
    )


def _scale_hidden(layer: LayerWeights, sizes: LayerSizes, weights: DecoderWeights) -> LayerWeights:
    """Even out the inside of the feed-forward block, where a factor passes from `up` to `down`."""
    if weights.config.activation not in ("swiglu", "relu"):
        return layer
    scale = _migration(sizes.hidden, layer.down.weight.abs().amax(dim=0), HIDDEN_MIGRATION)
    return replace(
        layer,
        up=_shrink_outputs(layer.up, scale),
        down=replace(layer.down, weight=layer.down.weight * scale),
    )


def _migration(size: Tensor, largest_weight: Tensor, share: float) -> Tensor:
    """Return the factors that activations of this size are divided by, and the weights behind them multiplied by."""
    # A component that is never active, or never read, must not blow up its partner.
    size = size.clamp(min=1e-3 * float(size.max()) or 1.0)
    largest_weight = largest_weight.clamp(min=1e-3 * float(largest_weight.max()) or 1.0)
    return size**share / largest_weight ** (1 - share)


def _shrink_outputs(each: Affine, scale: Tensor) -> Affine:
    return Affine(weight=each.weight / scale[:, None], bias=None if each.bias is None else each.bias / scale)
