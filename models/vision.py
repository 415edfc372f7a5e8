"""Images as sequences of patches, and the Vision Transformer that classifies them.

Shapes: B rows, C channels, Y image height, X image width, P patch height, Q patch width, N patches in reading order,
E model width, H heads. Images are float32; their scale is whatever the model was trained with.
Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv:2010.11929.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from models.checks import check_choices, check_integers
from models.encoder import EncoderStack, StackConfig
from models.model import Model, initialise
from models.states import Chunk

PatchPositions = Literal["none", "learned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEncoderConfig:
    """Images of one size, cut into square patches, and the layers that read them. Sizes are in pixels.

    `positions` are added to the embedded patches; the stack may have others, which act in reading order.

    Raises:
        ValueError: a field is out of range; the message names the field, its value and the limit.
    """

    height: int
    width: int
    num_channels: int
    patch_size: int
    positions: PatchPositions = "learned"
    stack: StackConfig

    def __post_init__(self) -> None:
        check_integers(self, 1, "height", "width", "num_channels", "patch_size")
        check_choices(self, positions=get_args(PatchPositions))
        for name in ("height", "width"):
            if getattr(self, name) % self.patch_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of patch_size, {self.patch_size}"
                )

    @property
    def num_patches(self) -> int:
        """How many patches an image has."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)


def split_patches(image: Tensor, height: int, width: int) -> Tensor:
    """Cut images (B, C, Y, X) into patches of the given size, in reading order: (B, N, C, P, Q).

    Raises:
        ValueError: the image is no multiple of the patch.
    """
    if image.shape[2] % height or image.shape[3] % width:
        raise ValueError(f"image is {tuple(image.shape[2:])}; it must be a multiple of the patch, {(height, width)}")
    rows = image.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, Y / P, P, X / Q, Q)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def xavier(module: nn.Module) -> None:
    """Draw the matrices of linear layers in proportion to their sizes, as the first Vision Transformers did.

    In narrow models GPT-2's constant deviation makes attention nearly uniform, and slow to become anything else.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)


class PatchEmbedding(nn.Module):
    """One linear map of a patch's pixels, and a learned vector for its place."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.image_shape = (config.num_channels, config.height, config.width)
        self.patch_size = config.patch_size
        width = config.stack.d_model
        self.projection = nn.Linear(config.num_channels * config.patch_size**2, width)
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.zeros(config.num_patches, width)) if learned else None

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, C, Y, X) to (B, N, E).

        Raises:
            ValueError: the images have another size or number of channels than configured.
        """
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; the model takes (rows, channels, height, width) with "
                f"{self.image_shape} after the rows"
            )
        x = self.projection(split_patches(image, self.patch_size, self.patch_size).flatten(2))
        return x if self.positions is None else x + self.positions


class ImageEncoder(nn.Module):
    """Images in, one vector for each patch out, each knowing the whole image."""

    def __init__(self, config: ImageEncoderConfig, *, dropout: float = 0.0):
        super().__init__()
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.dropout = nn.Dropout(dropout)
        self.stack = EncoderStack(config.stack, dropout=dropout)
        initialise(self, config.stack.num_layers)
        xavier(self)

    def forward(self, image: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return (B, N, E).

        Args:
            image: (B, C, Y, X).
            lengths: (B,) int64, how many of the patches, in reading order, are real: fewer where images of less
                height are padded at the bottom. All when None.

        Raises:
            ValueError: the images have another shape than configured, or lengths do not fit.
        """
        return self.stack(*self._embed(image, lengths))

    def attention_weights(self, image: Tensor, lengths: Tensor | None = None) -> list[Tensor]:
        """Return each layer's attention weights (B, H, N, N); arguments are those of `forward`."""
        return self.stack.attention_weights(*self._embed(image, lengths))

    def _embed(self, image: Tensor, lengths: Tensor | None) -> tuple[Tensor, Chunk]:
        x = self.dropout(self.patch_embedding(image))
        return x, Chunk.of(x[..., 0], lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTransformerConfig:
    """An image encoder and the number of classes that it tells apart.

    Raises:
        ValueError: num_classes is below 1.
    """

    encoder: ImageEncoderConfig
    num_classes: int

    def __post_init__(self) -> None:
        check_integers(self, 1, "num_classes")


class VisionTransformer(Model):
    """An encoder of patches and of a class token, which reads the patches and is classified.

    The class token has no position of its own: its learned vector is both.
    """

    config_class = VisionTransformerConfig

    def __init__(self, config: VisionTransformerConfig, *, dropout: float = 0.0):
        super().__init__(config)
        stack = config.encoder.stack
        self.patch_embedding = PatchEmbedding(config.encoder)
        self.class_token = nn.Parameter(torch.zeros(stack.d_model))
        self.dropout = nn.Dropout(dropout)
        self.stack = EncoderStack(stack, dropout=dropout)
        self.head = nn.Linear(stack.d_model, config.num_classes)
        initialise(self, stack.num_layers)
        xavier(self)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, Y, X).

        Raises:
            ValueError: the images have another shape than configured.
        """
        return self.head(self.features(image))

    def features(self, image: Tensor) -> Tensor:
        """Return what the class token has become, (B, E)."""
        return self.stack(*self._embed(image))[:, 0]

    def attention_weights(self, image: Tensor) -> list[Tensor]:
        """Return each layer's attention weights (B, H, 1 + N, 1 + N); the class token is the first."""
        return self.stack.attention_weights(*self._embed(image))

    def _embed(self, image: Tensor) -> tuple[Tensor, Chunk]:
        x = self.patch_embedding(image)
        x = self.dropout(torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), 1))
        return x, Chunk.of(x[..., 0])
