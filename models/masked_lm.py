"""A masked language model: an encoder, and BERT's head that says which token stands at each place.

Shapes: B rows, S tokens, E model width, V vocabulary. A row's tokens are right-padded.
Source: Devlin et al., BERT, 2018, arXiv:1810.04805.
"""

from torch import Tensor, nn

from models.encoder import Encoder, EncoderConfig
from models.layers import ACTIVATIONS, NORMS
from models.model import Model, initialise


class PredictionHead(nn.Module):
    """A dense layer with the encoder's activation, a norm, and the embeddings as output layer, with a bias."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.embedding_width
        self.dense = nn.Linear(config.stack.d_model, width)
        self.activation = ACTIVATIONS[config.stack.activation]
        self.norm = NORMS[config.stack.norm](width, eps=config.stack.norm_eps)
        self.output = nn.Linear(width, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., E) to logits (..., V)."""
        return self.output(self.norm(self.activation(self.dense(x))))


class MaskedLanguageModel(Model):
    """Token ids, some of them hidden, in; logits of the token at each place out."""

    config_class = EncoderConfig

    def __init__(self, config: EncoderConfig, *, dropout: float = 0.0):
        super().__init__(config)
        self.encoder = Encoder(config, dropout=dropout)
        self.head = PredictionHead(config)
        initialise(self.head, config.stack.num_layers)
        self.tie()

    def forward(self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None) -> Tensor:
        """Return logits (B, S, V); arguments are those of `Encoder`, and logits of padding mean nothing."""
        return self.head(self.encoder(token_ids, lengths, segment_ids=segment_ids))

    def attention_weights(
        self, token_ids: Tensor, lengths: Tensor | None = None, *, segment_ids: Tensor | None = None
    ) -> list[Tensor]:
        """Return each layer's attention weights (B, H, S, S)."""
        return self.encoder.attention_weights(token_ids, lengths, segment_ids=segment_ids)

    @property
    def tied_names(self) -> tuple[str, ...]:
        """The output layer's weight, which is the embedding."""
        return ("head.output.weight",)

    def tie(self) -> None:
        """Make the output layer's weight the embedding."""
        self.head.output.weight = self.encoder.token_embedding.weight
