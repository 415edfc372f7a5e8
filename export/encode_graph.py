"""The served graph of an encoder: texts in one pass, and what its head makes of them out.

B rows, S tokens of each, right-padded, T = B * S, E model width, N heads, D head width, C classes, V vocabulary, L
places whose logits are wanted. As in `graph`, the residual stream is flat, [T, E], and the graph shares the encoder's
tensors and is never run in PyTorch. Padding is masked as a key; what it becomes itself means nothing. Pooling and
probabilities lie outside, on exact lengths, because sums over padding would depend on how much there is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export import operators
from export.heads import Head
from export.layers import Norm, activate
from export.linear import FloatLinear, Kernels
from export.weights import affine, norm_weights
from models.attention.positions import Rotary
from models.encoder import Encoder, StackConfig
from models.transformer import TransformerLayer


class EncodeGraph(nn.Module):
    """Token ids, lengths and what else the head asks for in, the head's output out."""

    def __init__(self, encoder: Encoder, kernels: Kernels, head: Head) -> None:
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
        own = nn.ModuleList(_Layer(layer, kernels, config.stack) for layer in encoder.stack.layers)
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
        mask = torch.arange(tokens) < lengths[:, None]
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

    def __init__(self, layer: TransformerLayer, kernels: Kernels, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        attention, feed_forward = layer.attention, layer.feed_forward
        maps = [affine(each) for each in (attention.query, attention.key, attention.value)]
        self.query_key_value = kernels.context(maps)
        self.output = kernels.context([affine(attention.output)])
        self.attention_norm = _norm(layer.attention_norm)
        inner = [feed_forward.up] if feed_forward.gate is None else [feed_forward.gate, feed_forward.up]
        self.up = kernels.context([affine(each) for each in inner])
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
