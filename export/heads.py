"""What a served graph makes of an encoder's last layer, by task. Shapes are those of `encode_graph`."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from export.layers import Norm, activate
from export.linear import FloatLinear, Kernels
from export.weights import affine, norm_weights
from models.classifier import Classifier, Tagger
from models.masked_lm import MaskedLanguageModel


class Head(nn.Module, ABC):
    """The end of an encode graph; `takes_pairs` says whether it reads pairs of texts, `picks` whether single places."""

    takes_pairs = False
    picks = False

    @abstractmethod
    def forward(self, hidden: Tensor, shape: torch.Size, logits_index: Tensor | None) -> Tensor:
        """Map [T, E], of texts of shape (B, S), to what the graph returns; `logits_index` is [L] where it picks."""


class VectorHead(Head):
    """The vectors themselves: [B, S, E]."""

    def forward(self, hidden: Tensor, shape: torch.Size, logits_index: Tensor | None) -> Tensor:
        """Return [B, S, E]."""
        return hidden.reshape(*shape, -1)


class ClassHead(Head):
    """Logits of the classes of each text: [B, C]. The last map stays in fp32, being small."""

    takes_pairs = True

    def __init__(self, classifier: Classifier, kernels: Kernels) -> None:
        super().__init__()
        self.pooler = kernels.context([affine(classifier.pooler)])
        self.head = FloatLinear([affine(classifier.head)])

    def forward(self, hidden: Tensor, shape: torch.Size, logits_index: Tensor | None) -> Tensor:
        """Return [B, C]."""
        first = hidden.reshape(*shape, -1)[:, 0]
        (pooled,) = self.pooler(first)
        return self.head(torch.tanh(pooled))[0]


class TagHead(Head):
    """Logits of the classes of each token: [B, S, C]. The map stays in fp32, being small."""

    def __init__(self, tagger: Tagger) -> None:
        super().__init__()
        self.head = FloatLinear([affine(tagger.head)])

    def forward(self, hidden: Tensor, shape: torch.Size, logits_index: Tensor | None) -> Tensor:
        """Return [B, S, C]."""
        return self.head(hidden)[0].reshape(*shape, -1)


class FillHead(Head):
    """Logits of the tokens at the wanted places: [L, V]."""

    picks = True

    def __init__(self, model: MaskedLanguageModel, kernels: Kernels) -> None:
        super().__init__()
        head = model.head
        self.activation = model.config.stack.activation
        self.dense = kernels.context([affine(head.dense)])
        self.norm = Norm(norm_weights(head.norm), head.norm.eps)
        self.output = kernels.logits([affine(head.output)])

    def forward(self, hidden: Tensor, shape: torch.Size, logits_index: Tensor | None) -> Tensor:
        """Return [L, V]."""
        (inner,) = self.dense(hidden.index_select(0, logits_index))
        return self.output(self.norm(activate(self.activation, inner)))[0]
