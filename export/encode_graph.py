"""The served graph of an encoder: texts in one pass, a vector for every token out.

B rows, S tokens of each, right-padded, T = B * S, E model width. As in `graph`, the residual stream is flat, [T, E],
and the graph shares the encoder's tensors and is never run in PyTorch. Padding is masked as a key; what it becomes
itself means nothing. Pooling lies outside, on exact lengths, because sums over padding would depend on how much there
is.
"""

import torch
from torch import Tensor, nn

from export import operators
from export.layers import Norm, activate
from export.linear import Kernels
from export.weights import affine, norm_weights
from models.encoder import Encoder, StackConfig
from models.transformer import TransformerLayer


class EncodeGraph(nn.Module):
    """Token ids and lengths in, the last layer's output out."""

    def __init__(self, encoder: Encoder, kernels: Kernels) -> None:
        super().__init__()
        config = encoder.config
        self.config = config
        self.token_embedding = kernels.embedding(encoder.token_embedding.weight.detach())
        self.register_buffer("added", _added(encoder))
        self.embedding_norm = _norm(encoder.embedding_norm) if config.embedding_norm else nn.Identity()
        self.layers = nn.ModuleList(_Layer(layer, kernels, config.stack) for layer in encoder.stack.layers)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Encode int64 token_ids [B, S], of which the first int32 lengths [B] are real; return [B, S, E]."""
        rows, tokens = token_ids.shape
        hidden = self.token_embedding(token_ids.reshape(-1)).reshape(rows, tokens, -1)
        if self.added is not None:
            hidden = hidden + self.added[:tokens]
        hidden = self.embedding_norm(hidden.reshape(rows * tokens, -1))
        mask = torch.arange(tokens) < lengths[:, None]
        # Spelt out for every query: the operator refuses a mask that broadcasts over them.
        mask = mask[:, None, None].expand(rows, 1, tokens, tokens)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden.reshape(rows, tokens, -1)


class _Layer(nn.Module):
    """Attention and feed-forward, each followed by a norm of the sum."""

    def __init__(self, layer: TransformerLayer, kernels: Kernels, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        attention, feed_forward = layer.attention, layer.feed_forward
        maps = [affine(each) for each in (attention.query, attention.key, attention.value)]
        self.query_key_value = kernels.context(maps)
        self.output = kernels.context([affine(attention.output)])
        self.attention_norm = _norm(layer.attention_norm)
        self.up = kernels.context([affine(feed_forward.up)])
        self.down = kernels.hidden([affine(feed_forward.down)])
        self.feed_forward_norm = _norm(layer.feed_forward_norm)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Map [T, E] to [T, E] under a mask [B, 1, S, S]."""
        rows, _, tokens, _ = mask.shape
        query, key, value = (each.reshape(rows, tokens, -1) for each in self.query_key_value(hidden))
        context = operators.attention(query, key, value, mask, num_heads=self.config.num_heads)
        (update,) = self.output(context.reshape(rows * tokens, -1))
        hidden, _ = self.attention_norm.after(update, hidden)
        (inner,) = self.up(hidden)
        (update,) = self.down(activate(self.config.activation, inner))
        return self.feed_forward_norm.after(update, hidden)[0]


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm_weights(norm), norm.eps)


def _added(encoder: Encoder) -> Tensor | None:
    """Return what is added to token embeddings at each position, [max_source_len, E]: positions, and segment 0."""
    added: Tensor | None = None
    if encoder.position_embedding is not None:
        added = encoder.position_embedding(torch.arange(encoder.config.max_source_len)[None])[0].detach()
    if encoder.segment_embedding is not None:
        segment = encoder.segment_embedding.weight[:1].detach()
        added = segment.expand(encoder.config.max_source_len, -1).clone() if added is None else added + segment
    return added
