"""The Transformer as it was first described: an encoder reads a source, a decoder writes a target and attends to it.

Shapes: B rows, S source tokens, T target tokens, E encoder width, V target vocabulary, C capacity.
Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig
from models.model import Model
from models.states import State


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


class EncoderDecoder(Model):
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
        names = ("decoder.lm_head.weight",) if self.config.decoder.tie_embeddings else ()
        return (*names, "encoder.token_embedding.weight") if self.config.share_embeddings else names

    def encode(self, source_ids: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return the memory (B, S, E) of source_ids (B, S), of which the first `source_lengths` (B,) are real."""
        return self.encoder(source_ids, source_lengths)

    def begin(self, memory: Tensor, source_lengths: Tensor | None = None, capacity: int | None = None) -> State:
        """Return the state of empty targets of at most `capacity` tokens, one for each row of a memory (B, S, E)."""
        return self.decoder.initial_state(len(memory), capacity, memory=memory, source_lengths=source_lengths)

    def decode(self, token_ids: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Return logits (B, T, V) after each of the new target tokens (B, T), and the next state."""
        return self.decoder(token_ids, state, lengths)

    def forward(self, source_ids: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of the whole target token_ids (B, T), each position seeing what precedes it."""
        memory_valid = self._valid(source_ids, source_lengths)
        return self.decoder(token_ids, memory=self.encode(source_ids, source_lengths), memory_valid=memory_valid)

    def attention_weights(
        self, source_ids: Tensor, token_ids: Tensor, source_lengths: Tensor | None = None
    ) -> SequenceWeights:
        """Return the weights of all three kinds of attention; arguments are those of `forward`."""
        decoder, cross = self.decoder.attention_weights(
            token_ids,
            memory=self.encode(source_ids, source_lengths),
            memory_valid=self._valid(source_ids, source_lengths),
        )
        return SequenceWeights(self.encoder.attention_weights(source_ids, source_lengths), decoder, cross)

    @staticmethod
    def _valid(source_ids: Tensor, source_lengths: Tensor | None) -> Tensor | None:
        if source_lengths is None:
            return None
        return torch.arange(source_ids.shape[1], device=source_ids.device) < source_lengths[:, None]

    def tie(self) -> None:
        """Make tied tensors one, after any was replaced."""
        self.decoder.tie()
        if self.config.share_embeddings:
            self.encoder.token_embedding.weight = self.decoder.token_embedding.weight
