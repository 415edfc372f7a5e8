"""The Transformer as it was first described: an encoder reads a source, a decoder writes a target and attends to it.

Shapes: B rows, S source tokens, T target tokens, E encoder width, V target vocabulary, C capacity.
Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig
from models.model import Model
from models.states import State, StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """Both sides. With `share_embeddings` one table serves the source and the target.

    Raises:
        ValueError: embeddings are shared by sides of different vocabulary or width.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        source = (self.encoder.vocab_size, self.encoder.stack.d_model)
        target = (self.decoder.vocab_size, self.decoder.d_model)
        if self.share_embeddings and source != target:
            raise ValueError(
                f"share_embeddings is true; the encoder's (vocab_size, d_model) {source} must be the decoder's {target}"
            )


class SequenceWeights(NamedTuple):
    """Attention weights by layer: encoder (B, H, S, S), decoder (B, H, T, T), cross (B, H, T, S)."""

    encoder: list[Tensor]
    decoder: list[Tensor]
    cross: list[Tensor]


class SourceToSequence(Model):
    """What models share that write a sequence about a source of any kind; a subclass builds both sides.

    `encoder` takes sources and lengths, returns a memory (B, S, E), and has `attention_weights` of the same arguments.
    `decoder` attends to such a memory.
    """

    encoder: nn.Module
    decoder: Decoder

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Declare the states of the decoder."""
        return self.decoder.state_specs()

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, E) of sources, of which the first `source_lengths` (B,) of S are real."""
        return self.encoder(source, source_lengths)

    def begin(self, memory: Tensor, source_lengths: Tensor | None = None, capacity: int | None = None) -> State:
        """Return the state of empty targets of at most `capacity` tokens, one for each row of a memory (B, S, E)."""
        return self.decoder.initial_state(memory.shape[0], capacity, memory=memory, source_lengths=source_lengths)

    def decode(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Return logits (B, T, V) after each of the new target tokens (B, T), and the next state."""
        return self.decoder(token_ids, state, lengths)

    def forward(self, source: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of the whole target token_ids (B, T), each position seeing what precedes it."""
        memory = self.encode(source, source_lengths)
        return self.decoder(token_ids, memory=memory, memory_valid=self._valid(memory, source_lengths))

    def attention_weights(
        self, source: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None
    ) -> SequenceWeights:
        """Return the weights of all three kinds of attention; arguments are those of `forward`."""
        memory = self.encode(source, source_lengths)
        decoder, cross = self.decoder.attention_weights(
            token_ids, memory=memory, memory_valid=self._valid(memory, source_lengths)
        )
        return SequenceWeights(self.encoder.attention_weights(source, source_lengths), decoder, cross)

    def cross_attention_weights(
        self, source: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None
    ) -> list[Tensor]:
        """Return each layer's weights (B, H, T, S) of the source, whatever the kinds of self-attention are."""
        memory = self.encode(source, source_lengths)
        return self.decoder.cross_attention_weights(token_ids, memory, self._valid(memory, source_lengths))

    @property
    def tied_names(self) -> tuple[str, ...]:
        """The decoder's, as they are called here."""
        return tuple(f"decoder.{name}" for name in self.decoder.tied_names)

    def tie(self) -> None:
        """Make tied tensors one, after any was replaced."""
        self.decoder.tie()

    @staticmethod
    def _valid(memory: Tensor, source_lengths: Tensor | None) -> Tensor | None:
        if source_lengths is None:
            return None
        return torch.arange(memory.shape[1], device=memory.device) < source_lengths[:, None]


class EncoderDecoder(SourceToSequence):
    """Source ids and target ids in, logits of the next target token out."""

    config_class = EncoderDecoderConfig

    def __init__(self, config: EncoderDecoderConfig, *, dropout: float = 0.0):
        super().__init__(config)
        self.encoder = Encoder(config.encoder, dropout=dropout)
        self.decoder = Decoder(config.decoder, d_memory=config.encoder.stack.d_model, dropout=dropout)
        self.tie()

    @property
    def tied_names(self) -> tuple[str, ...]:
        """Names in the `state_dict` of tensors that are another's."""
        names = super().tied_names
        return (*names, "encoder.token_embedding.weight") if self.config.share_embeddings else names

    def tie(self) -> None:
        """Make tied tensors one, after any was replaced."""
        super().tie()
        if self.config.share_embeddings:
            self.encoder.token_embedding.weight = self.decoder.token_embedding.weight
