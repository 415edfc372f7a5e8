"""A bidirectional encoder: BERT by its configuration, and the source side of an encoder-decoder.

Shapes: B rows, S tokens, E model width, V vocabulary. A row's tokens are right-padded.
Source: Devlin et al., BERT, 2018, arXiv:1810.04805.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.attention.linear import LinearAttention
from models.attention.longformer import LongformerAttention
from models.attention.mean import MeanAttention
from models.attention.multihead import MultiHeadAttention
from models.attention.positions import LearnedPositions, Rotary, SinusoidalPositions
from models.checks import check_choices, check_integers, check_positive
from models.decoder_config import Activation, Norm
from models.layers import ACTIVATIONS, NORMS, FeedForward
from models.model import Model, initialise
from models.states import Chunk
from models.transformer import TransformerLayer

RelativePositions = Literal["none", "rotary", "alibi"]
AbsolutePositions = Literal["none", "learned", "sinusoidal"]
Attention = Literal["softmax", "longformer", "favor", "elu", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """Sizes and choices of a stack of bidirectional layers.

    `positions` are those that act inside attention; `bias` is that of every linear layer. With a `window` a token sees
    fewer than so many tokens to either side; with attention "longformer", half as many as the window, which is even.
    With `share_layers` all layers are one, applied again and again (Lan et al., ALBERT, 2019, arXiv:1909.11942).

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    d_model: int
    num_layers: int
    num_heads: int
    d_ff: int
    positions: RelativePositions = "none"
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = True
    activation: Activation = "gelu"
    bias: bool = True
    attention: Attention = "softmax"
    window: int | None = None
    num_features: int = 256
    qk_norm: bool = False
    share_layers: bool = False

    def __post_init__(self) -> None:
        check_integers(self, 1, "d_model", "num_layers", "num_heads", "d_ff", "window", "num_features")
        check_positive(self, "norm_eps")
        check_choices(
            self,
            positions=get_args(RelativePositions),
            norm=NORMS,
            activation=ACTIVATIONS,
            attention=get_args(Attention),
        )
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}; it must be a multiple of num_heads, {self.num_heads}")
        if self.attention == "longformer" and (self.window is None or self.window % 2):
            raise ValueError(f"window is {self.window}; attention 'longformer' needs an even one, half to either side")
        if self.attention not in ("softmax", "longformer") and self.window is not None:
            raise ValueError(f"attention is {self.attention!r}; a window needs 'softmax' or 'longformer'")
        if self.attention != "softmax" and self.positions == "alibi":
            raise ValueError(f"attention is {self.attention!r}; alibi needs 'softmax'")


class EncoderStack(nn.Module):
    """Layers of bidirectional self-attention, and the final norm where the layers have none at their end."""

    def __init__(self, config: StackConfig, *, dropout: float = 0.0):
        super().__init__()
        self.config = config
        num_own = 1 if config.share_layers else config.num_layers
        self.layers = nn.ModuleList(self._layer(config, dropout) for _ in range(num_own))
        norm = NORMS[config.norm]
        self.final_norm = norm(config.d_model, eps=config.norm_eps) if config.norm_first else nn.Identity()

    @property
    def depth(self) -> list[nn.Module]:
        """The layers in the order in which they are applied."""
        return list(self.layers) * (self.config.num_layers // len(self.layers))

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map x (B, S, E) to (B, S, E); what padding becomes means nothing."""
        for layer in self.depth:
            x = layer(x, chunk).x
        return self.final_norm(x)

    def attention_weights(self, x: Tensor, chunk: Chunk) -> list[Tensor]:
        """Return each layer's weights (B, H, S, S)."""
        weights = []
        for layer in self.depth:
            output = layer(x, chunk, need_weights=True)
            x = output.x
            weights.append(output.weights)
        return weights

    @staticmethod
    def _layer(config: StackConfig, dropout: float) -> TransformerLayer:
        rotary = Rotary(config.d_model // config.num_heads) if config.positions == "rotary" else None
        options = {"rotary": rotary, "qk_norm": config.qk_norm, "qkv_bias": config.bias, "output_bias": config.bias}
        attention: nn.Module
        if config.attention == "mean":
            attention = MeanAttention(config.d_model, bias=config.bias)
        elif config.attention == "softmax":
            attention = MultiHeadAttention(
                config.d_model,
                config.num_heads,
                alibi=config.positions == "alibi",
                window=config.window,
                dropout=dropout,
                **options,
            )
        elif config.attention == "longformer":
            attention = LongformerAttention(
                config.d_model, config.num_heads, window=config.window, dropout=dropout, **options
            )
        else:
            attention = LinearAttention(
                config.d_model,
                config.num_heads,
                features=config.attention,
                num_features=config.num_features,
                **options,
            )
        return TransformerLayer(
            attention,
            FeedForward(config.d_model, config.d_ff, config.activation, bias=config.bias),
            [NORMS[config.norm](config.d_model, eps=config.norm_eps) for _ in range(2)],
            norm_first=config.norm_first,
            dropout=dropout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder of tokens.

    `max_source_len` counts tokens. `positions` are added to the embeddings. `num_segments` kinds of text are told apart
    by an embedding each; 0 is none. `embedding_norm` normalises the sum of embeddings, as BERT does; `scale_embeddings`
    multiplies token embeddings by the square root of the width. Embeddings of `d_embedding` components, where
    that is given, are widened by a linear map.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    vocab_size: int
    max_source_len: int
    positions: AbsolutePositions
    num_segments: int = 0
    embedding_norm: bool = False
    scale_embeddings: bool = False
    d_embedding: int | None = None
    stack: StackConfig

    def __post_init__(self) -> None:
        check_integers(self, 1, "vocab_size", "max_source_len", "d_embedding")
        check_integers(self, 0, "num_segments")
        check_choices(self, positions=get_args(AbsolutePositions))

    @property
    def embedding_width(self) -> int:
        """Components of an embedding."""
        return self.stack.d_model if self.d_embedding is None else self.d_embedding


class Encoder(Model):
    """Token ids in, one vector for each token out, each knowing the whole text."""

    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig, *, dropout: float = 0.0):
        super().__init__(config)
        width = config.embedding_width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding: nn.Module | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.max_source_len, width)
        elif config.positions == "sinusoidal":
            self.position_embedding = SinusoidalPositions(width)
        self.segment_embedding = nn.Embedding(config.num_segments, width) if config.num_segments else None
        norm = NORMS[config.stack.norm]
        self.embedding_norm = norm(width, eps=config.stack.norm_eps) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        widens = config.d_embedding is not None
        self.embedding_projection = nn.Linear(width, config.stack.d_model) if widens else nn.Identity()
        self.stack = EncoderStack(config.stack, dropout=dropout)
        initialise(self, config.stack.num_layers)
        if config.scale_embeddings:
            nn.init.normal_(self.token_embedding.weight, std=width**-0.5)

    def forward(
        self,
        token_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        is_global: Tensor | None = None,
    ) -> Tensor:
        """Return (B, S, E).

        Args:
            token_ids: (B, S) int64.
            lengths: (B,) int64, how many tokens of each row are real; all when None.
            segment_ids: (B, S) int64 below num_segments; 0 everywhere when None.
            is_global: (B, S) booleans, the tokens that see and are seen by all where attention has a window.

        Raises:
            ValueError: there are more tokens than max_source_len, or lengths do not fit.
        """
        chunk = self._chunk(token_ids, lengths, is_global)
        return self.stack(self._embed(token_ids, chunk, segment_ids), chunk)

    def attention_weights(
        self,
        token_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        is_global: Tensor | None = None,
    ) -> list[Tensor]:
        """Return each layer's attention weights (B, H, S, S); arguments are those of `forward`."""
        chunk = self._chunk(token_ids, lengths, is_global)
        return self.stack.attention_weights(self._embed(token_ids, chunk, segment_ids), chunk)

    def _chunk(self, token_ids: Tensor, lengths: Tensor | None, is_global: Tensor | None) -> Chunk:
        limit = self.config.max_source_len
        if token_ids.shape[1] > limit:
            raise ValueError(f"token_ids has {token_ids.shape[1]} tokens; max_source_len is {limit}")
        return Chunk.of(token_ids, lengths, is_global=is_global)

    def _embed(self, token_ids: Tensor, chunk: Chunk, segment_ids: Tensor | None) -> Tensor:
        x = self.token_embedding(token_ids)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.embedding_width)
        if self.position_embedding is not None:
            x = x + self.position_embedding(chunk.positions).to(x.dtype)
        if self.segment_embedding is not None:
            x = x + self.segment_embedding(torch.zeros_like(token_ids) if segment_ids is None else segment_ids)
        return self.embedding_projection(self.dropout(self.embedding_norm(x)))
