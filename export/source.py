"""What a model writes about: a text of tokens, an image, or nothing.

S source length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import ROWS, SOURCE, Axis, DType, ImageInput, Role, TensorSpec
from models.captioner import Captioner
from models.encoder_decoder import SourceToSequence
from models.model import Model

MULTIPLE = 16
"""States of a source are bound at its longest length rounded up to this, alone and among others: sums of other shapes
round differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Token ids [S] of a vocabulary of its own."""

    max_len: int
    vocab_size: int

    @property
    def tensor(self) -> TensorSpec:
        """The input that takes sources."""
        return TensorSpec(name="source_ids", role=Role.SOURCE_IDS, dtype=DType.INT64, axes=(ROWS, SOURCE))

    @property
    def axis(self) -> Axis:
        """The source axis of states: a name, because sources differ in length."""
        return SOURCE

    @property
    def padded_len(self) -> int:
        """The length that states of a source are bound at."""
        return -(-self.max_len // MULTIPLE) * MULTIPLE

    def draw(self, generator: np.random.Generator, num: int) -> list[NDArray[Any]]:
        """Draw sources of lengths from `max_len` down to 1."""
        lengths = np.linspace(self.max_len, 1, num).astype(int)
        return [generator.integers(0, self.vocab_size, length) for length in lengths]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSource:
    """Images float32 [channels, height, width] of one size, of which the model makes `num_patches` places."""

    image: ImageInput
    num_patches: int

    @property
    def tensor(self) -> TensorSpec:
        """The input that takes sources."""
        axes = (ROWS, self.image.channels, self.image.height, self.image.width)
        return TensorSpec(name="image", role=Role.IMAGE, dtype=DType.FLOAT32, axes=axes)

    @property
    def axis(self) -> Axis:
        """The source axis of states: a number, because all patches are real."""
        return self.num_patches

    @property
    def padded_len(self) -> int:
        """The length that states of a source are bound at."""
        return self.num_patches

    def draw(self, generator: np.random.Generator, num: int) -> list[NDArray[Any]]:
        """Draw images of uniform noise."""
        shape = (self.image.channels, self.image.height, self.image.width)
        return [generator.random(shape, np.float32) for _ in range(num)]


Source = TextSource | ImageSource


def source_of(model: Model) -> Source | None:
    """Return what a model writes about; None where it continues a text."""
    if isinstance(model, Captioner):
        config = model.config.encoder
        image = ImageInput(
            height=config.height,
            width=config.width,
            channels=config.num_channels,
            mean=(0.0,) * config.num_channels,
            std=(1.0,) * config.num_channels,
        )
        return ImageSource(image=image, num_patches=config.num_patches)
    if isinstance(model, SourceToSequence):
        config = model.config.encoder
        return TextSource(max_len=config.max_source_len, vocab_size=config.vocab_size)
    if hasattr(model, "encode"):
        return TextSource(max_len=model.config.max_source_len, vocab_size=model.config.source_vocab_size)
    return None


def target_config(model: Model) -> Any:
    """Return the configuration with `max_model_len` and `vocab_size` of what a model writes."""
    return model.config.decoder if isinstance(model, SourceToSequence) else model.config
