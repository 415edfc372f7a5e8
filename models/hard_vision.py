"""Hard attention over the patches of an image: glance at all of them, look at one, and name what it shows.

The glance is cheap: a few averages of a patch and one score. Only the patch that is chosen is encoded, so the cost of
the encoder does not grow with the image.

Shapes: B rows, C channels, Y image height, X image width, P patch height, Q patch width, N patches in reading order,
E width of features. Source: Xu et al., Show, Attend and Tell, 2015, arXiv:1502.03044 (its stochastic hard attention);
the clutter that it looks past: Mnih et al., Recurrent Models of Visual Attention, 2014, arXiv:1406.6247.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.hard import most_likely, take
from models.attention.normalizers import masked_softmax
from models.checks import check_choices, check_integers
from models.model import Model
from models.vision import VisionTransformer, VisionTransformerConfig, split_patches, xavier

PatchAttention = Literal["hard", "soft", "mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HardVisionConfig:
    """How images are glanced at, and the model of a single patch.

    An image has `rows` by `columns` patches of the size of the images that `patch` classifies. A glance averages each
    patch into `glance_size` by `glance_size` blocks and scores these with `d_glance` hidden units. `attention` is hard
    (the best patch is read), soft (all are, and their features are averaged by weight: the expectation of hard
    attention's features) or mean (averaged alike, the ablation).

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    rows: int
    columns: int
    glance_size: int
    d_glance: int
    attention: PatchAttention = "hard"
    patch: VisionTransformerConfig

    def __post_init__(self) -> None:
        check_integers(self, 1, "rows", "columns", "glance_size", "d_glance")
        check_choices(self, attention=get_args(PatchAttention))
        for name in ("height", "width"):
            size = getattr(self.patch.encoder, name)
            if size % self.glance_size:
                raise ValueError(f"glance_size is {self.glance_size}; it must divide the patch's {name}, {size}")


class HardVision(Model):
    """Images in, logits of the classes of one patch out, and the weights by which it is chosen.

    Hard attention is trained by sampling: `choose` from `attention_weights` with `models.attention.hard.sample`, `look`
    there, and hand likelihood and choice to `reinforce_loss`. The other kinds are differentiable as they are.
    """

    config_class = HardVisionConfig

    def __init__(self, config: HardVisionConfig, *, dropout: float = 0.0):
        super().__init__(config)
        num_averages = config.patch.encoder.num_channels * config.glance_size**2
        self.glance = nn.Linear(num_averages, config.d_glance)
        self.score = nn.Linear(config.d_glance, 1, bias=False)
        xavier(self)
        self.patch = VisionTransformer(config.patch, dropout=dropout)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, Y, X); hard attention reads the patch of the largest weight.

        Raises:
            ValueError: the images have another shape than configured.
        """
        weights = self.attention_weights(image)
        if self.config.attention == "hard":
            return self.look(image, most_likely(weights).index)
        patches = self._patches(image)
        features = self.patch.features(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])  # (B, N, E)
        return self.patch.head((weights[:, None] @ features).squeeze(1))

    def attention_weights(self, image: Tensor) -> Tensor:
        """Return the weights of the patches, (B, N): of the choice, or of the mean."""
        patches = self._patches(image)
        if self.config.attention == "mean":
            return patches.new_full(patches.shape[:2], 1 / patches.shape[1])
        block = (patches.shape[3] // self.config.glance_size, patches.shape[4] // self.config.glance_size)
        averages = F.avg_pool2d(patches.flatten(0, 2)[:, None], block).reshape(*patches.shape[:2], -1)
        return masked_softmax(self.score(self.glance(averages).tanh()).squeeze(-1))

    def look(self, image: Tensor, index: Tensor) -> Tensor:
        """Return logits (B, classes) of the patches at index (B,), int64; no other patch is encoded."""
        return self.patch(take(self._patches(image), index))

    def _patches(self, image: Tensor) -> Tensor:
        """Return the patches (B, N, C, P, Q) of images of the configured size."""
        size = self.config.patch.encoder
        expected = (size.num_channels, self.config.rows * size.height, self.config.columns * size.width)
        if image.shape[1:] != expected:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; the model takes (rows, channels, height, width) with "
                f"{expected} after the rows"
            )
        return split_patches(image, size.height, size.width)
