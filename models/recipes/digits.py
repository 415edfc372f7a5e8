"""Recipe `digits`: a Vision Transformer names handwritten digits; with a `clutter` table it must find them first.

A cluttered picture is a grid of cells: one holds a digit, the others fragments of digits. Only the digit's name is
taught, never its place.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from models import checkpoint
from models.attention.functional import entropy
from models.attention.hard import MovingBaseline, reinforce_loss, sample
from models.checkpoint import TrainedModel
from models.checks import check_shares
from models.config import ConfigError
from models.hard_vision import HardVision, HardVisionConfig, PatchAttention
from models.model import Model
from models.training.config import OptimiserConfig, RunConfig
from models.training.digits import SIZE, WORDS, Cluttered, Digits, cluttered, read_digits
from models.training.loop import CHECKPOINT, Task, train
from models.vision import VisionTransformer, VisionTransformerConfig

NUM_TEST_PICTURES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ClutterConfig:
    """Pictures of `rows` by `columns` cells, and the attention that chooses among them (`HardVisionConfig`).

    `entropy_weight` is how much indecision is rewarded while hard attention learns.
    """

    rows: int
    columns: int
    glance_size: int
    d_glance: int
    attention: PatchAttention = "hard"
    entropy_weight: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsConfig:
    """The recipe. `model` reads single digits; with `clutter`, one cell of a picture at a time.

    `distortion` is how much digits are turned, stretched and shifted in training; 1 is what other hands might do.
    """

    run: RunConfig
    optimiser: OptimiserConfig
    model: VisionTransformerConfig
    clutter: ClutterConfig | None = None
    dropout: float = 0.0
    distortion: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self, "dropout")
        if not self.distortion >= 0.0:
            raise ConfigError(f"distortion is {self.distortion}; it must be at least 0")
        encoder = self.model.encoder
        given = (encoder.num_channels, encoder.height, encoder.width, self.model.num_classes)
        needed = (1, SIZE, SIZE, len(WORDS))
        if given != needed:
            raise ConfigError(f"model has (num_channels, height, width, num_classes) {given}; digits need {needed}")


CONFIG = DigitsConfig


def run(config: DigitsConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of `evaluate`, and the mean loss on the test digits in nats as "validation_loss".
    """
    training, test = read_digits("training"), read_digits("test")
    torch.manual_seed(config.run.seed)
    clutter, batch_size = config.clutter, config.run.batch_size
    model: Model
    if clutter is None:
        model = trainee = VisionTransformer(config.model, dropout=config.dropout)
    else:
        model = HardVision(_hard_vision(clutter, config.model), dropout=config.dropout)
        baseline = MovingBaseline()
        trainee = nn.ModuleList([model, baseline])  # what a run must remember to continue

    def loss() -> Tensor:
        if clutter is None:
            digits = training.draw((batch_size,)).distorted(config.distortion)
            return F.cross_entropy(model(digits.images), digits.labels)
        pictures = cluttered(training.distorted(config.distortion), batch_size, (clutter.rows, clutter.columns))
        if clutter.attention != "hard":
            return F.cross_entropy(model(pictures.images), pictures.labels)
        return hard_loss(model, pictures, baseline, clutter.entropy_weight)

    trained = TrainedModel(
        module=model,
        tokenizer=None,
        labels=WORDS,
        source="trained by the recipe digits",
        licence="BSD-3-Clause",
        recipe="digits",
        data="handwritten digits of scikit-learn (models/data/README.md)",
    )
    task = Task(
        module=trainee,
        loss=loss,
        evaluate=lambda: figures(model, test),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return the share of test digits that are named rightly and, in clutter, found."""
    return figures(trained.module, read_digits("test"))


def hard_loss(model: HardVision, pictures: Cluttered, baseline: MovingBaseline, entropy_weight: float) -> Tensor:
    """Return the loss of one sampled look at each picture, whose gradient REINFORCE estimates."""
    choice = sample(model.attention_weights(pictures.images))
    logits = model.look(pictures.images, choice.index)
    log_likelihood = -F.cross_entropy(logits, pictures.labels, reduction="none")
    return reinforce_loss(
        log_likelihood,
        choice.log_prob,
        choice.entropy,
        baseline=baseline(log_likelihood),
        entropy_weight=entropy_weight,
    )


@torch.inference_mode()
def figures(model: VisionTransformer | HardVision, digits: Digits) -> dict[str, float]:
    """Return loss and accuracy on digits, in clutter on pictures of them that are always the same.

    In clutter also: how often the place of the largest weight is the digit's, the mean entropy of the weights in nats,
    and the accuracy of looking at random places instead.
    """
    if isinstance(model, VisionTransformer):
        return _accuracy(model(digits.images), digits.labels)
    grid = (model.config.rows, model.config.columns)
    generator = Generator().manual_seed(0)
    pictures = cluttered(digits, NUM_TEST_PICTURES, grid, generator)
    weights = model.attention_weights(pictures.images)
    anywhere = torch.randint(grid[0] * grid[1], (NUM_TEST_PICTURES,), generator=generator)
    random = _accuracy(model.look(pictures.images, anywhere), pictures.labels)["accuracy"]
    return _accuracy(model(pictures.images), pictures.labels) | {
        "location_accuracy": (weights.argmax(1) == pictures.places).float().mean().item(),
        "entropy": entropy(weights).mean().item(),
        "random_accuracy": random,
    }


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "validation_loss": F.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(1) == labels).float().mean().item(),
    }


def _hard_vision(clutter: ClutterConfig, patch: VisionTransformerConfig) -> HardVisionConfig:
    return HardVisionConfig(
        rows=clutter.rows,
        columns=clutter.columns,
        glance_size=clutter.glance_size,
        d_glance=clutter.d_glance,
        attention=clutter.attention,
        patch=patch,
    )
