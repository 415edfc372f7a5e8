"""Recipe `caption`: an encoder sees a scene of one to four digits, a decoder says which they are and how they lie.

A caption names the first digit in reading order and then every other one with its relation to the first: "three",
"three above left of seven", "three left of one and above seven". Each scene has exactly one.

Shapes: B scenes, T tokens, N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Generator, Tensor

from models import checkpoint
from models.beam import BeamSearch, search
from models.captioner import Captioner, CaptionerConfig
from models.checkpoint import TrainedModel
from models.checks import check_shares
from models.config import ConfigError
from models.training.characters import tokenizer_info, word_tokenizer
from models.training.config import OptimiserConfig, RunConfig
from models.training.digits import SIZE, WORDS, Scenes, read_digits, scenes
from models.training.loop import CHECKPOINT, Task, train
from models.training.pairs import END, START, Batch, inputs_and_labels, pair_loss
from models.vision import split_patches

MAX_TOKENS = 13
"""The longest caption, its end included: three digits besides the first, one of them "above left of" it."""
NUM_TEST_SCENES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """The recipe. `distortion` is how much digits are turned, stretched and shifted in training."""

    run: RunConfig
    optimiser: OptimiserConfig
    model: CaptionerConfig
    dropout: float = 0.0
    distortion: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self, "dropout")
        if not self.distortion >= 0.0:
            raise ConfigError(f"distortion is {self.distortion}; it must be at least 0")
        encoder, decoder = self.model.encoder, self.model.decoder
        if (encoder.num_channels, encoder.height, encoder.width) != (1, 2 * SIZE, 2 * SIZE):
            raise ConfigError(
                f"model.encoder has (num_channels, height, width) "
                f"{(encoder.num_channels, encoder.height, encoder.width)}; scenes need {(1, 2 * SIZE, 2 * SIZE)}"
            )
        if SIZE % encoder.patch_size:
            raise ConfigError(f"model.encoder.patch_size is {encoder.patch_size}; it must divide a cell's side, {SIZE}")
        if decoder.max_model_len < MAX_TOKENS:
            raise ConfigError(
                f"model.decoder.max_model_len is {decoder.max_model_len}; it must be at least {MAX_TOKENS}"
            )


CONFIG = CaptionConfig


def describe(cells: Sequence[int]) -> str:
    """Return the caption of a scene whose four cells, in reading order, hold these digits; -1 is nothing.

    Raises:
        ValueError: all cells are empty.
    """
    filled = [place for place, label in enumerate(cells) if label >= 0]
    if not filled:
        raise ValueError(f"cells are {tuple(cells)}; a caption needs a digit in one of them")
    first, *others = filled
    relations = " and ".join(f"{_relation(first, other)} {WORDS[cells[other]]}" for other in others)
    return f"{WORDS[cells[first]]} {relations}".rstrip()


def caption_tokenizer() -> Tokenizer:
    """Return the tokenizer of captions, words separated by white space."""
    return word_tokenizer([*WORDS, "above left right of and"])


def run(config: CaptionConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of `evaluate`.

    Raises:
        ConfigError: the vocabulary's size is not that of captions.
    """
    training, tokenizer = read_digits("training"), caption_tokenizer()
    if (given := config.model.decoder.vocab_size) != (needed := tokenizer.get_vocab_size()):
        raise ConfigError(f"model.decoder.vocab_size is {given}; captions need {needed}")
    torch.manual_seed(config.run.seed)
    model = Captioner(config.model, dropout=config.dropout)
    trained = TrainedModel(
        module=model,
        tokenizer=tokenizer_info(tokenizer),
        source="trained by the recipe caption",
        licence="BSD-3-Clause",
        recipe="caption",
        data="scenes of scikit-learn's handwritten digits (models/data/README.md)",
    )

    def loss() -> Tensor:
        drawn = scenes(training.distorted(config.distortion), config.run.batch_size)
        return pair_loss(model, collate(drawn, tokenizer, config.model.encoder.num_patches))

    task = Task(
        module=model,
        loss=loss,
        evaluate=lambda: evaluate(trained),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


@torch.inference_mode()
def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return mean nats per token, and shares of scenes of test digits, always the same, that are captioned rightly.

    "exact_of_four" is that of scenes with four digits. "cell_accuracy" is how often, where a digit's name is due, most
    of the attention, over all layers and heads, lies on its cell.
    """
    drawn = scenes(read_digits("test"), NUM_TEST_SCENES, Generator().manual_seed(0))
    captions = write(trained, drawn.images)
    right = [caption == describe(cells) for caption, cells in zip(captions, drawn.cells.tolist(), strict=True)]
    exact, four = torch.tensor(right).float(), (drawn.cells >= 0).all(1)
    tokenizer = Tokenizer.from_str(trained.tokenizer.json)
    batch = collate(drawn, tokenizer, trained.module.config.encoder.num_patches)
    return {
        "validation_loss": pair_loss(trained.module, batch).item(),
        "exact": exact.mean().item(),
        "exact_of_four": exact[four].mean().item(),
        "cell_accuracy": cell_accuracy(trained.module, tokenizer, drawn, batch),
    }


def write(trained: TrainedModel, images: Tensor, *, width: int = 1) -> list[str]:
    """Return a caption for each image, found by a beam search of the given width."""
    tokenizer = Tokenizer.from_str(trained.tokenizer.json)
    options = BeamSearch(width=width, max_tokens=MAX_TOKENS, start_token_id=START, end_token_id=END)
    found = search(trained.module, images, None, options)
    return [" ".join(tokenizer.id_to_token(token) for token in best[0].token_ids) for best in found]


def collate(drawn: Scenes, tokenizer: Tokenizer, num_patches: int) -> Batch:
    """Put scenes and their captions into one batch."""
    captions = [tokenizer.encode(describe(cells)).ids for cells in drawn.cells.tolist()]
    lengths = torch.full((len(captions),), num_patches)
    return Batch(drawn.images, lengths, *inputs_and_labels(captions))


def cell_accuracy(model: Captioner, tokenizer: Tokenizer, drawn: Scenes, batch: Batch) -> float:
    """Return how often a digit's name is read from its cell: where its patches have the most attention together."""
    layers = model.attention_weights(drawn.images, batch.inputs).cross
    weights = torch.stack([layer.mean(1) for layer in layers]).mean(0)  # (B, T, N)
    cells = weights @ _cells_of_patches(model.config.encoder.patch_size)  # (B, T, 4)
    named = torch.isin(batch.labels, torch.tensor([tokenizer.token_to_id(word) for word in WORDS]))
    places = (drawn.cells >= 0).nonzero()[:, 1]  # captions name digits in reading order too
    return (cells[named].argmax(1) == places).float().mean().item()


def _cells_of_patches(patch_size: int) -> Tensor:
    """Return (N, 4), 1 where a patch lies in a cell and 0 elsewhere."""
    cells = torch.arange(4).reshape(1, 1, 2, 2).repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)
    return F.one_hot(split_patches(cells, patch_size, patch_size)[0, :, 0, 0, 0], 4).float()


def _relation(first: int, other: int) -> str:
    """Say how the first digit lies to another that comes later in reading order, both being cells of two by two."""
    across = {-1: "left of", 0: "", 1: "right of"}[first % 2 - other % 2]
    return " ".join(filter(None, ("above" if first // 2 < other // 2 else "", across)))
