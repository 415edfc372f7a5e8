"""The weights of a decoder as plain tensors, so that they can be rewritten without touching the decoder.

Nothing here computes the model: `models.decoder` is the oracle and `export.graph` the served graph.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.transformer import TransformerLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """y = x @ weight.T + bias, with weight [out, in] as in `torch.nn.Linear`."""

    weight: Tensor
    bias: Tensor | None = None


def pack(*maps: Affine) -> Affine:
    """Return one map with the outputs of all maps side by side; a map without a bias among others adds zeros."""
    weight = torch.cat([each.weight for each in maps])
    if all(each.bias is None for each in maps):
        return Affine(weight=weight)
    biases = [weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in maps]
    return Affine(weight=weight, bias=torch.cat(biases))


@dataclass(frozen=True, slots=True, kw_only=True)
class NormWeights:
    """Gain [d_model] of an RMS norm, or gain and bias of a layer norm."""

    gain: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossWeights:
    """What a layer does with a source whose keys and values are made already."""

    norm: NormWeights
    query: Affine
    output: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; `gate` is present for gated activations only, `cross` where it attends to a source."""

    attention_norm: NormWeights
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    cross: CrossWeights | None
    feed_forward_norm: NormWeights
    gate: Affine | None
    up: Affine
    down: Affine


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """A whole decoder: `token_embedding` [vocab, d_model], `positions` [max_model_len, d_model] or None.

    `rotation` is cosines and sines [max_model_len, D / 2], of head width D, or None where positions are not rotary.
    Where embeddings are tied, `lm_head.weight` is the same tensor as `token_embedding`. All are of one dtype.
    """

    config: DecoderConfig
    token_embedding: Tensor
    positions: Tensor | None
    rotation: tuple[Tensor, Tensor] | None
    layers: tuple[LayerWeights, ...]
    final_norm: NormWeights
    lm_head: Affine


def decoder_weights(decoder: Decoder) -> DecoderWeights:
    """Return the decoder's own tensors; nothing is copied."""
    token_embedding = decoder.token_embedding.weight.detach()
    lm_head = affine(decoder.lm_head)
    if decoder.config.tie_embeddings:
        # One object, not two views of one memory: the exporter stores tensors by identity.
        lm_head = replace(lm_head, weight=token_embedding)
    return DecoderWeights(
        config=decoder.config,
        token_embedding=token_embedding,
        positions=_positions(decoder),
        rotation=_rotation(decoder),
        layers=tuple(_layer(layer) for layer in decoder.layers),
        final_norm=norm_weights(decoder.final_norm),
        lm_head=lm_head,
    )


def map_tensors(weights: DecoderWeights, change: Callable[[Tensor], Tensor]) -> DecoderWeights:
    """Return weights of which every tensor is changed; what was one tensor before is one afterwards."""
    changed: dict[int, Tensor] = {}

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            return changed.setdefault(id(part), change(part))
        if isinstance(part, tuple):
            return tuple(visit(each) for each in part)
        if is_dataclass(part) and not isinstance(part, DecoderConfig):
            return replace(part, **{field.name: visit(getattr(part, field.name)) for field in fields(part)})
        return part

    mapped: DecoderWeights = visit(weights)
    return mapped


def _positions(decoder: Decoder) -> Tensor | None:
    if decoder.position_embedding is None:
        return None
    positions = decoder.position_embedding(torch.arange(decoder.config.max_model_len)).detach()
    return positions.to(decoder.token_embedding.weight.dtype)


def _rotation(decoder: Decoder) -> tuple[Tensor, Tensor] | None:
    """Return the tables of the first layer, which are those of all."""
    rotary = decoder.layers[0].attention.rotary
    if rotary is None:
        return None
    cosines, sines = rotary.angles(torch.arange(decoder.config.max_model_len))
    dtype = decoder.token_embedding.weight.dtype
    return cosines.to(dtype), sines.to(dtype)


def _layer(layer: TransformerLayer) -> LayerWeights:
    attention, feed_forward = layer.attention, layer.feed_forward
    return LayerWeights(
        attention_norm=norm_weights(layer.attention_norm),
        query=affine(attention.query),
        key=affine(attention.key),
        value=affine(attention.value),
        output=affine(attention.output),
        cross=_cross(layer),
        feed_forward_norm=norm_weights(layer.feed_forward_norm),
        gate=None if feed_forward.gate is None else affine(feed_forward.gate),
        up=affine(feed_forward.up),
        down=affine(feed_forward.down),
    )


def _cross(layer: TransformerLayer) -> CrossWeights | None:
    cross = layer.cross_attention
    if cross is None:
        return None
    return CrossWeights(
        norm=norm_weights(layer.cross_attention_norm), query=affine(cross.query), output=affine(cross.output)
    )


def affine(linear: nn.Linear) -> Affine:
    """Return the tensors of a linear layer."""
    return Affine(weight=linear.weight.detach(), bias=None if linear.bias is None else linear.bias.detach())


def norm_weights(norm: nn.Module) -> NormWeights:
    """Return the tensors of a norm."""
    return NormWeights(gain=norm.weight.detach(), bias=None if norm.bias is None else norm.bias.detach())
