"""A causal decoder: the Llama and the GPT-2 families by its configuration, and the target side of an encoder-decoder.

Shapes: B rows, T new tokens, S source length, E model width, M memory width, V vocabulary, C capacity. A row's tokens
are right-padded.
"""

import math
from dataclasses import replace
from typing import get_args, overload

import torch
from torch import Tensor, nn

from models.attention.linear import CHUNK, Features, LinearAttention
from models.attention.mean import MeanAttention, MeanCrossAttention
from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.attention.positions import LearnedPositions, Rotary, SinusoidalPositions
from models.decoder_config import DecoderConfig
from models.layers import NORMS, FeedForward
from models.model import Model, initialise
from models.states import Chunk, State, StateSpec
from models.transformer import TransformerLayer

__all__ = ["Decoder", "DecoderConfig"]


def self_attention(config: DecoderConfig, dropout: float) -> nn.Module:
    """Build the causal self-attention that a configuration describes."""
    if config.attention == "mean":
        return MeanAttention(config.d_model, causal=True, bias=config.bias == "all")
    rotary = None
    if config.positions == "rotary":
        rotary = Rotary(config.head_dim, theta=config.rope_theta, interleaved=config.rope_interleaved)
    projections = {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.bias != "none",
        "output_bias": config.bias == "all",
    }
    if config.attention != "softmax":
        return LinearAttention(
            config.d_model,
            config.num_heads,
            features=config.attention,
            num_features=config.num_features,
            causal=True,
            rotary=rotary,
            **projections,
        )
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        causal=True,
        rotary=rotary,
        alibi=config.positions == "alibi",
        window=config.window,
        window_state=config.window_state,
        softcap=config.softcap,
        dropout=dropout,
        **projections,
    )


def decoder_layer(config: DecoderConfig, d_memory: int | None, dropout: float) -> TransformerLayer:
    """Build one layer, with attention to a memory of width `d_memory` unless that is None."""
    cross_attention: nn.Module | None = None
    if d_memory is not None and config.attention == "mean":
        cross_attention = MeanCrossAttention(config.d_model, d_memory, bias=config.bias == "all")
    elif d_memory is not None:
        cross_attention = CrossAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            d_memory=d_memory,
            qk_norm=config.qk_norm,
            qkv_bias=config.bias != "none",
            output_bias=config.bias == "all",
            softcap=config.softcap,
            dropout=dropout,
        )
    return TransformerLayer(
        self_attention(config, dropout),
        FeedForward(config.d_model, config.d_ff, config.activation, bias=config.bias == "all"),
        [NORMS[config.norm](config.d_model, eps=config.norm_eps) for _ in range(2 if d_memory is None else 3)],
        cross_attention=cross_attention,
        norm_first=config.norm_first,
        dropout=dropout,
    )


class Decoder(Model):
    """A causal language model: token ids in, logits of the next token out.

    A new decoder has random weights (GPT-2's initialisation). `dropout` acts in training only and is no part of
    the configuration. With `d_memory` every layer also attends to a memory of that width, so that the decoder continues
    a sequence that translates, describes or transcribes it.
    """

    config_class = DecoderConfig

    def __init__(self, config: DecoderConfig, *, d_memory: int | None = None, dropout: float = 0.0):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding: nn.Module | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.max_model_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.position_embedding = SinusoidalPositions(config.d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(decoder_layer(config, d_memory, dropout) for _ in range(config.num_layers))
        # Where each block ends in a norm, the last of them is the final one.
        self.final_norm = (
            NORMS[config.norm](config.d_model, eps=config.norm_eps) if config.norm_first else nn.Identity()
        )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.attention in get_args(Features):
            self.step_tokens = CHUNK
        self.tie()
        initialise(self, config.num_layers)
        if config.scale_embeddings:  # drawn smaller by what they are multiplied with
            nn.init.normal_(self.token_embedding.weight, std=config.d_model**-0.5)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare every layer's states, named "<layer>.<name>"."""
        return tuple(
            replace(spec, name=f"{index}.{spec.name}")
            for index, layer in enumerate(self.layers)
            for spec in layer.state_specs()
        )

    def initial_state(
        self,
        rows: int,
        capacity: int | None = None,
        *,
        memory: Tensor | None = None,
        source_lengths: Tensor | None = None,
    ) -> State:
        """Return the state of `rows` empty sequences of at most `capacity` tokens (max_model_len when None).

        Args:
            rows: how many sequences.
            capacity: in tokens.
            memory: (B, S, M), what the sequences attend to; its keys and values are made here, once.
            source_lengths: (B,) int64, how much of each row's memory is real; all when None.

        Raises:
            ValueError: the capacity is below 1 or above max_model_len.
        """
        limit = self.config.max_model_len
        capacity = limit if capacity is None else capacity
        if not 1 <= capacity <= limit:
            raise ValueError(f"capacity is {capacity}; it must lie in 1..{limit}, the model's max_model_len")
        device = self.token_embedding.weight.device
        fixed: dict[str, Tensor] = {}
        if memory is not None:
            for index, layer in enumerate(self.layers):
                fixed |= {f"{index}.{name}": tensor for name, tensor in layer.project(memory).items()}
            if source_lengths is None:
                source_lengths = torch.full((rows,), memory.shape[1], dtype=torch.int64, device=device)
        return State.empty(
            self.state_specs(), rows, capacity, device, fixed=fixed, source_lengths=source_lengths
        )  # fmt: skip

    @overload
    def forward(
        self, token_ids: Tensor, state: None = None, lengths: Tensor | None = None, *,
        memory: Tensor | None = None, memory_valid: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]: ...

    def forward(
        self,
        token_ids: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Return logits (B, T, V), and the next state where one is given.

        Args:
            token_ids: (B, T) int64, the new tokens.
            state: what the rows consumed before; None starts at position 0 and keeps nothing.
            lengths: (B,) int64, how many of the T tokens of each row are real, all when None. Logits of padding
                mean nothing.
            memory: (B, S, M), where no state holds it already.
            memory_valid: (B or 1, S) booleans, False for padding of the memory.

        Raises:
            ValueError: a row would outgrow the state or max_model_len, or lengths do not fit token_ids.
        """
        chunk = self._chunk(token_ids, state, lengths)
        x = self._embed(token_ids, chunk)
        present: dict[str, Tensor] = {}
        if state is not None:
            memory_valid = state.source_valid
        for index, layer in enumerate(self.layers):
            past, projected = None, None
            if state is not None:
                past = {spec.name: state.tensors[f"{index}.{spec.name}"] for spec in layer.state_specs()}
                projected = past
            elif memory is not None:
                projected = layer.project(memory)
            output = layer(x, chunk, past, projected, memory_valid)
            x = output.x
            present |= {f"{index}.{name}": tensor for name, tensor in output.present.items()}
        logits = self.lm_head(self.final_norm(x))
        return logits if state is None else (logits, state.advance(chunk, present))

    def attention_weights(
        self,
        token_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        memory: Tensor | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return each layer's self-attention weights (B, H, T, T), and cross-attention weights (B, H, T, S) if any."""
        chunk = self._chunk(token_ids, None, lengths)
        x, weights, cross_weights = self._embed(token_ids, chunk), [], []
        for layer in self.layers:
            projected = None if memory is None else layer.project(memory)
            output = layer(x, chunk, None, projected, memory_valid, need_weights=True)
            x = output.x
            weights.append(output.weights)
            if output.cross_weights is not None:
                cross_weights.append(output.cross_weights)
        return weights, cross_weights

    def cross_attention_weights(
        self, token_ids: Tensor, memory: Tensor, memory_valid: Tensor | None = None
    ) -> list[Tensor]:
        """Return each layer's cross-attention weights (B, H, T, S), whether self-attention has weights or not."""
        chunk, weights = self._chunk(token_ids, None, None), []
        x = self._embed(token_ids, chunk)
        for layer in self.layers:
            output = layer(x, chunk, None, layer.project(memory), memory_valid, need_cross_weights=True)
            x = output.x
            weights.append(output.cross_weights)
        return weights

    def _chunk(self, token_ids: Tensor, state: State | None, lengths: Tensor | None) -> Chunk:
        """Place the new tokens after what their rows consumed, within the limits."""
        if state is None:
            if token_ids.shape[1] > self.config.max_model_len:
                raise ValueError(
                    f"token_ids has {token_ids.shape[1]} tokens; max_model_len is {self.config.max_model_len}"
                )
            return Chunk.of(token_ids, lengths)
        chunk = Chunk.of(token_ids, lengths, state.lengths)
        if not torch.compiler.is_exporting():  # a traced graph knows no values
            longest = int((chunk.start + chunk.lengths).amax()) if len(token_ids) else 0
            if longest > state.capacity:
                raise ValueError(f"a row would hold {longest} tokens; the state's capacity is {state.capacity}")
        return chunk

    def _embed(self, token_ids: Tensor, chunk: Chunk) -> Tensor:
        x = self.token_embedding(token_ids)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.d_model)
        if self.position_embedding is not None:
            # Positions of padding may pass the end of a learned table; what they read is never used.
            positions = chunk.positions.clamp(max=self.config.max_model_len - 1)
            x = x + self.position_embedding(positions).to(x.dtype)
        return self.dropout(x)

    @property
    def tied_names(self) -> tuple[str, ...]:
        """The output layer's weight, if it is the embedding."""
        return ("lm_head.weight",) if self.config.tie_embeddings else ()

    def tie(self) -> None:
        """Make the output layer's weight the embedding."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight
