"""Encoders that say what a text is: one answer for the whole text, or one for each token.

Shapes: B rows, S tokens, E model width, C classes. A row's tokens are right-padded.
Source: Devlin et al., BERT, 2018, arXiv:1810.04805 (its heads for sentences and for tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.checks import check_integers
from models.encoder import Encoder, EncoderConfig
from models.model import Model, initialise


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierConfig:
    """An encoder and the number of classes that are told apart; with `multi_label` several may hold at once.

    Raises:
        ValueError: num_classes is below 1.
    """

    encoder: EncoderConfig
    num_classes: int
    multi_label: bool = False

    def __post_init__(self) -> None:
        check_integers(self, 1, "num_classes")

    @property
    def vocab_size(self) -> int:
        """Tokens that the encoder knows."""
        return self.encoder.vocab_size


class Classifier(Model):
    """Texts or pairs of texts in, logits of their classes out, read from what the first token has become.

    With one class it scores a text, or how well the second text of a pair answers the first (a cross-encoder).
    """

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig, *, dropout: float = 0.0):
        super().__init__(config)
        stack = config.encoder.stack
        self.encoder = Encoder(config.encoder, dropout=dropout)
        self.pooler = nn.Linear(stack.d_model, stack.d_model)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(stack.d_model, config.num_classes)
        for part in (self.pooler, self.head):
            initialise(part, stack.num_layers)

    def forward(self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None) -> Tensor:
        """Return logits (B, C); arguments are those of `Encoder`."""
        first = self.encoder(token_ids, lengths, segment_ids=segment_ids)[:, 0]
        return self.head(self.dropout(torch.tanh(self.pooler(first))))

    def attention_weights(
        self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Return each layer's attention weights (B, H, S, S)."""
        return self.encoder.attention_weights(token_ids, lengths, segment_ids=segment_ids)


class Tagger(Model):
    """Texts in, logits of the class of each token out."""

    config_class = ClassifierConfig

    def __init__(self, config: ClassifierConfig, *, dropout: float = 0.0):
        super().__init__(config)
        stack = config.encoder.stack
        self.encoder = Encoder(config.encoder, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(stack.d_model, config.num_classes)
        initialise(self.head, stack.num_layers)

    def forward(self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None) -> Tensor:
        """Return logits (B, S, C); arguments are those of `Encoder`, and logits of padding mean nothing."""
        return self.head(self.dropout(self.encoder(token_ids, lengths, segment_ids=segment_ids)))

    def attention_weights(
        self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Return each layer's attention weights (B, H, S, S)."""
        return self.encoder.attention_weights(token_ids, lengths, segment_ids=segment_ids)
