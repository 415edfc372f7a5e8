"""A pre-norm decoder that covers the Llama and the GPT-2 families by its configuration.

Shapes: B rows, T new tokens, E model width, V vocabulary, C capacity. A row's tokens are right-padded.
"""

import math
from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor, nn

from models.attention.multihead import Attended, MultiHeadAttention
from models.attention.positions import LearnedPositions, Rotary, SinusoidalPositions
from models.decoder_config import DecoderConfig
from models.layers import NORMS, FeedForward
from models.states import Chunk, State, StateSpec

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer"]


class DecoderLayer(nn.Module):
    """Self-attention and a feed-forward block, each on a normed copy of a residual stream."""

    def __init__(self, config: DecoderConfig, *, dropout: float = 0.0):
        super().__init__()
        rotary = None
        if config.positions == "rotary":
            rotary = Rotary(config.head_dim, theta=config.rope_theta, interleaved=config.rope_interleaved)
        norm = NORMS[config.norm]
        self.attention_norm = norm(config.d_model, eps=config.norm_eps)
        self.attention = MultiHeadAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            causal=True,
            rotary=rotary,
            qkv_bias=config.bias != "none",
            output_bias=config.bias == "all",
            dropout=dropout,
        )
        self.feed_forward_norm = norm(config.d_model, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.d_model, config.d_ff, config.activation, bias=config.bias == "all")
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, chunk: Chunk, past: Mapping[str, Tensor] | None = None, *, need_weights: bool = False
    ) -> Attended:
        """Map x (B, T, E) to the next layer's input; weights and present are those of the attention."""
        attended = self.attention(self.attention_norm(x), chunk, past, need_weights=need_weights)
        x = x + self.dropout(attended.output)
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return attended._replace(output=x)


class Decoder(nn.Module):
    """A causal language model: token ids in, logits of the next token out.

    A new decoder has random weights (GPT-2's initialisation). `dropout` acts in training only and is no part of
    the configuration.
    """

    def __init__(self, config: DecoderConfig, *, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding: nn.Module | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.max_model_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.position_embedding = SinusoidalPositions(config.d_model)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout=dropout) for _ in range(config.num_layers))
        self.final_norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._tie()
        self._initialise()

    @classmethod
    def from_weights(cls, config: DecoderConfig, weights: Mapping[str, Tensor]) -> "Decoder":
        """Build a decoder, in evaluation mode, around existing float tensors named as in `state_dict`.

        With tied embeddings `lm_head.weight` is absent.

        Raises:
            ValueError: tensors are missing, surplus or of another shape; the message names them.
        """
        with torch.device("meta"):
            decoder = cls(config)
        expected = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
        if config.tie_embeddings:
            del expected["lm_head.weight"]
        if missing := sorted(expected.keys() - weights.keys()):
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        if surplus := sorted(weights.keys() - expected.keys()):
            raise ValueError(f"surplus tensors: {', '.join(surplus)}")
        for name, shape in expected.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(
                    f"tensor {name} has shape {tuple(weights[name].shape)}; the configuration gives {shape}"
                )
        decoder.load_state_dict(weights, strict=False, assign=True)
        decoder._tie()
        return decoder.eval()

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare every layer's states, named "<layer>.<name>"."""
        return tuple(
            StateSpec(
                name=f"{index}.{spec.name}",
                rule=spec.rule,
                dtype=spec.dtype,
                shape=spec.shape,
                window=spec.window,
            )
            for index, layer in enumerate(self.layers)
            for spec in layer.attention.state_specs()
        )

    def initial_state(self, rows: int, capacity: int | None = None) -> State:
        """Return the state of `rows` empty sequences of at most `capacity` tokens (max_model_len when None).

        Raises:
            ValueError: the capacity is below 1 or above max_model_len.
        """
        limit = self.config.max_model_len
        capacity = limit if capacity is None else capacity
        if not 1 <= capacity <= limit:
            raise ValueError(f"capacity is {capacity}; it must lie in 1..{limit}, the model's max_model_len")
        return State.empty(self.state_specs(), rows, capacity, self.token_embedding.weight.device)

    @overload
    def forward(self, token_ids: Tensor, state: None = None, lengths: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]: ...

    def forward(
        self, token_ids: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> Tensor | tuple[Tensor, State]:
        """Return logits (B, T, V), and the next state where one is given.

        Args:
            token_ids: (B, T) int64, the new tokens.
            state: what the rows consumed before; None starts at position 0 and keeps nothing.
            lengths: (B,) int64, how many of the T tokens of each row are real, all when None. Logits of padding
                mean nothing.

        Raises:
            ValueError: a row would outgrow the state or max_model_len, or lengths do not fit token_ids.
        """
        chunk = self._chunk(token_ids, state, lengths)
        x = self._embed(token_ids, chunk)
        present: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            past = None
            if state is not None:
                names = (spec.name for spec in layer.attention.state_specs())
                past = {name: state.tensors[f"{index}.{name}"] for name in names}
            attended = layer(x, chunk, past)
            x = attended.output
            present |= {f"{index}.{name}": tensor for name, tensor in attended.present.items()}
        logits = self.lm_head(self.final_norm(x))
        return logits if state is None else (logits, state.advance(chunk, present))

    def attention_weights(self, token_ids: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Return each layer's attention weights (B, H, T, T) over token_ids (B, T)."""
        chunk = self._chunk(token_ids, None, lengths)
        x, weights = self._embed(token_ids, chunk), []
        for layer in self.layers:
            attended = layer(x, chunk, need_weights=True)
            x = attended.output
            weights.append(attended.weights)
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
        longest = int((chunk.start + chunk.lengths).amax()) if len(token_ids) else 0
        if longest > state.capacity:
            raise ValueError(f"a row would hold {longest} tokens; the state's capacity is {state.capacity}")
        return chunk

    def _embed(self, token_ids: Tensor, chunk: Chunk) -> Tensor:
        x = self.token_embedding(token_ids)
        if self.position_embedding is not None:
            # Positions of padding may pass the end of a learned table; what they read is never used.
            positions = chunk.positions.clamp(max=self.config.max_model_len - 1)
            x = x + self.position_embedding(positions).to(x.dtype)
        return self.dropout(x)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    def _initialise(self) -> None:
        """Draw weights as GPT-2 does: N(0, 0.02), smaller where a layer writes to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if residual else 0.02)
