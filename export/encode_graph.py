"""The served graph of an encoder: texts in one pass, and what its head makes of them out.

B rows, S tokens of each, right-padded, T = B * S, E model width, N heads, D head width, C classes, V vocabulary, L
places whose logits are wanted. As in `graph`, the residual stream is flat, [T, E], and the graph shares the encoder's
tensors and is never run in PyTorch. Padding is masked as a key; what it becomes itself means nothing. Pooling and
probabilities lie outside, on exact lengths, because sums over padding would depend on how much there is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from export import operators
from export.calibration import LayerInputs
from export.heads import Head
from export.layers import Norm, activate
from export.linear import BalancedLinear, FixedRangeLinear, FloatLinear, Kernels
from export.rewrite import random_rotation
from export.weights import Affine, affine, norm_weights
from models.attention.positions import Rotary
from models.encoder import Encoder, StackConfig
from models.transformer import TransformerLayer

# Of the largest value on a text: attention averages values, so that it comes near the largest only where a token
# attends to itself alone. Chosen by the cosine of MiniLM's vectors, of repeated words too.
CONTEXT_SHARE = 0.7
_SEED = 20_261_121


class EncodeGraph(nn.Module):
    """Token ids, lengths and what else the head asks for in, the head's output out.

    Args:
        encoder: whose weights are taken.
        kernels: for maps of which nothing was measured.
        head: what comes behind the last layer.
        inputs: measured on each of the encoder's own layers, which makes their scales constant; for 8 bits.
    """

    def __init__(
        self, encoder: Encoder, kernels: Kernels, head: Head, inputs: Sequence[LayerInputs] | None = None
    ) -> None:
        super().__init__()
        config = encoder.config
        self.config = config
        self.head = head
        self.takes_segments = head.takes_pairs and encoder.segment_embedding is not None
        self.token_embedding = kernels.embedding(encoder.token_embedding.weight.detach())
        self.register_buffer("added", _added(encoder, with_segment=not self.takes_segments))
        segments = encoder.segment_embedding.weight.detach().clone() if self.takes_segments else None
        self.register_buffer("segments", segments)
        self.embedding_norm = _norm(encoder.embedding_norm)
        widens = isinstance(encoder.embedding_projection, nn.Linear)
        self.widening = FloatLinear([affine(encoder.embedding_projection)]) if widens else None
        cosines, sines = _rotation(config.stack, config.max_source_len)
        self.register_buffer("cosines", cosines)
        self.register_buffer("sines", sines)
        measured = [None] * len(encoder.stack.layers) if inputs is None else inputs
        own = nn.ModuleList(
            _Layer(layer, kernels, config.stack, each)
            for layer, each in zip(encoder.stack.layers, measured, strict=True)
        )
        self.own_layers = own
        self.layers = list(own) * (config.stack.num_layers // len(own))
        self.final_norm = _norm(encoder.stack.final_norm)

    @property
    def extra_inputs(self) -> list[str]:
        """Names of the inputs that not every graph has, in their order."""
        names = {"segment_ids": self.takes_segments, "logits_index": self.head.picks}
        return [name for name, taken in names.items() if taken]

    def forward(self, token_ids: Tensor, lengths: Tensor, extra: Sequence[Tensor] = ()) -> Tensor:
        """Encode int64 token_ids [B, S], of which the first int32 lengths [B] are real.

        Args:
            token_ids: [B, S] int64.
            lengths: [B] int32.
            extra: the `extra_inputs`: segment_ids [B, S] int64, and logits_index [L] int64, flat positions.
        """
        given = dict(zip(self.extra_inputs, extra, strict=True))
        rows, tokens = token_ids.shape
        hidden = self.token_embedding(token_ids.reshape(-1)).reshape(rows, tokens, -1)
        if self.added is not None:
            hidden = hidden + self.added[:tokens]
        hidden = hidden.reshape(rows * tokens, -1)
        if self.segments is not None:
            hidden = hidden + self.segments.index_select(0, given["segment_ids"].reshape(-1))
        hidden = self.embedding_norm(hidden)
        if self.widening is not None:
            (hidden,) = self.widening(hidden)
        mask = torch.where(torch.arange(tokens) < lengths[:, None], 0.0, float("-inf"))
        # Spelt out for every query: the operator refuses a mask that broadcasts over them.
        mask = mask[:, None, None].expand(rows, 1, tokens, tokens)
        rotation = None
        if self.cosines is not None:
            rotation = tuple(table[:tokens].expand(rows, -1, -1) for table in (self.cosines, self.sines))
        for layer in self.layers:
            hidden = layer(hidden, mask, rotation)
        return self.head(self.final_norm(hidden), token_ids.shape, given.get("logits_index"))


class _Layer(nn.Module):
    """Attention and feed-forward, each between a norm before and a sum, or between a sum and a norm of it."""

    def __init__(
        self, layer: TransformerLayer, kernels: Kernels, config: StackConfig, inputs: LayerInputs | None
    ) -> None:
        super().__init__()
        self.config = config
        attention, feed_forward = layer.attention, layer.feed_forward
        query, key, value, output = (
            affine(each) for each in (attention.query, attention.key, attention.value, attention.output)
        )
        inner = [feed_forward.up] if feed_forward.gate is None else [feed_forward.gate, feed_forward.up]
        up = [affine(each) for each in inner]
        if inputs is None:
            self.query_key_value = kernels.normalised([query, key, value])
            self.output = kernels.context([output])
            self.up = kernels.normalised(up)
        else:
            value, output = rotate_values(value, output, config.num_heads)
            values = nn.functional.linear(inputs.attention, value.weight, value.bias)
            self.query_key_value = BalancedLinear([query, key, value], inputs.attention)
            self.output = FixedRangeLinear([output], CONTEXT_SHARE * float(values.abs().max()))
            self.up = BalancedLinear(up, inputs.feed_forward)
        self.attention_norm = _norm(layer.attention_norm)
        self.down = kernels.hidden([affine(feed_forward.down)])
        self.feed_forward_norm = _norm(layer.feed_forward_norm)

    def forward(self, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map [T, E] to [T, E] under a mask [B, 1, S, S]; cosines and sines are [B, S, D / 2]."""
        if self.config.norm_first:
            update = self._attend(self.attention_norm(hidden), mask, rotation)
            normalised, hidden = self.feed_forward_norm.after(update, hidden)
            return operators.add(hidden, self._feed_forward(normalised))
        hidden, _ = self.attention_norm.after(self._attend(hidden, mask, rotation), hidden)
        return self.feed_forward_norm.after(self._feed_forward(hidden), hidden)[0]

    def _attend(self, hidden: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        rows, _, tokens, _ = mask.shape
        num_heads = self.config.num_heads
        query, key, value = (each.reshape(rows, tokens, -1) for each in self.query_key_value(hidden))
        if rotation is not None:
            query, key = (operators.rotate(each, *rotation, num_heads=num_heads) for each in (query, key))
        context = operators.attention(query, key, value, mask, num_heads=num_heads)
        return self.output(context.reshape(rows * tokens, -1))[0]

    def _feed_forward(self, hidden: Tensor) -> Tensor:
        return self.down(activate(self.config.activation, *self.up(hidden)))[0]


def rotate_values(value: Affine, output: Affine, num_heads: int) -> tuple[Affine, Affine]:
    """Rotate each head's values, and rotate back in the output map: attention only averages values."""
    rotation = random_rotation(len(value.weight) // num_heads, _SEED)
    heads = (num_heads, -1)
    weight = rotation.T @ value.weight.unflatten(0, heads)  # [N, D, E]
    bias = None if value.bias is None else (value.bias.unflatten(0, heads) @ rotation).flatten()
    back = (output.weight.unflatten(1, heads) @ rotation).flatten(1)
    return Affine(weight=weight.flatten(0, 1), bias=bias), replace(output, weight=back)


def _norm(norm: nn.Module) -> nn.Module:
    return norm if isinstance(norm, nn.Identity) else Norm(norm_weights(norm), norm.eps)


def _added(encoder: Encoder, *, with_segment: bool) -> Tensor | None:
    """Return what is added to token embeddings at each position, [max_source_len, E]: positions, perhaps segment 0."""
    added: Tensor | None = None
    if encoder.position_embedding is not None:
        added = encoder.position_embedding(torch.arange(encoder.config.max_source_len)[None])[0].detach()
    if encoder.segment_embedding is not None and with_segment:
        segment = encoder.segment_embedding.weight[:1].detach()
        added = segment.expand(encoder.config.max_source_len, -1).clone() if added is None else added + segment
    return added


def _rotation(config: StackConfig, max_source_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Return cosines and sines [max_source_len, D / 2], or nothing where positions are not rotary."""
    if config.positions != "rotary":
        return None, None
    return Rotary(config.d_model // config.num_heads).angles(torch.arange(max_source_len))
