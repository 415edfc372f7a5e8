"""Recipe `dates`: a recurrent encoder-decoder that rewrites dates from how people write them to ISO 8601.

Characters go in, characters come out. Whole years are held out, so that a year must be read and cannot be remembered.

Shapes: B dates, S source characters, T target characters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from models import checkpoint
from models.attention.functional import entropy
from models.beam import BeamSearch, search
from models.checkpoint import TrainedModel
from models.checks import check_shares
from models.config import ConfigError
from models.recurrent import Recurrent, RecurrentConfig
from models.training.characters import character_tokenizer, tokenizer_info
from models.training.config import OptimiserConfig, RunConfig
from models.training.dates import ISO_FIELDS, WrittenDate, written_dates
from models.training.loop import CHECKPOINT, Task, train
from models.training.pairs import END, START, Pair, collate, mean_loss, pad, pair_loss, random_batch

_VALIDATION_DATES = 500
_TEST_DATES = 2000
_BATCH = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class DatesConfig:
    """The recipe; vocabulary sizes are those of the dates' characters, special tokens included."""

    run: RunConfig
    optimiser: OptimiserConfig
    model: RecurrentConfig
    training_dates: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.training_dates < 1:
            raise ConfigError(f"training_dates is {self.training_dates}; it must be at least 1")
        check_shares(self, "dropout")


CONFIG = DatesConfig


def run(config: DatesConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of the last evaluation, on dates of the validation years.

    Raises:
        ConfigError: vocabulary sizes are not those of the dates.
    """
    dates, held_out = written_dates("training", config.training_dates), written_dates("validation", _VALIDATION_DATES)
    source = character_tokenizer((written.text.lower() for written in dates), lowercase=True)
    target = character_tokenizer(["0123456789-"])
    for name, given, tokenizer in (
        ("source_vocab_size", config.model.source_vocab_size, source),
        ("vocab_size", config.model.vocab_size, target),
    ):
        if given != tokenizer.get_vocab_size():
            raise ConfigError(f"model.{name} is {given}; the dates need {tokenizer.get_vocab_size()}")
    training, validation = pairs_of(dates, source, target), pairs_of(held_out, source, target)
    torch.manual_seed(config.run.seed)
    model = Recurrent(config.model, dropout=config.dropout)
    trained = TrainedModel(
        module=model,
        tokenizer=tokenizer_info(target),
        source_tokenizer=tokenizer_info(source),
        source="trained by the recipe dates",
        licence="Apache-2.0",
        recipe="dates",
        data="generated dates (models/training/dates.py)",
    )
    task = Task(
        module=model,
        loss=lambda: pair_loss(model, random_batch(training, config.run.batch_size)),
        evaluate=lambda: {"validation_loss": mean_loss(model, validation, _BATCH)} | figures(trained, held_out),
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return the figures on dates of the test years."""
    return figures(trained, written_dates("test", _TEST_DATES))


@torch.inference_mode()
def figures(trained: TrainedModel, dates: Sequence[WrittenDate]) -> dict[str, float]:
    """Return how well dates are rewritten, and where the model looks meanwhile.

    `exact_match` is the share of dates that come out right, greedily. Of all digits, with those before them given,
    `field_alignment` is the share during which the largest weight lies on the field that the digit belongs to, and
    `entropy` the mean entropy of the weights in nats.
    """
    right = sum(
        found == written.iso
        for found, written in zip(rewrite(trained, [written.text for written in dates]), dates, strict=True)
    )
    aligned = total = 0
    nats = 0.0
    source, target = tokenizers_of(trained)
    for start in range(0, len(dates), _BATCH):
        part = dates[start : start + _BATCH]
        batch = collate(pairs_of(part, source, target))
        weights = trained.module.attention_weights(batch.source, batch.inputs, batch.source_lengths).cross[0][:, 0]
        places, entropies = weights.argmax(-1).tolist(), entropy(weights).tolist()
        for row, written in enumerate(part):
            for position, field in enumerate(ISO_FIELDS):
                if field is not None:
                    first, end = written.spans[field]
                    aligned += first <= places[row][position] < end
                    nats += entropies[row][position]
                    total += 1
    return {"exact_match": right / len(dates), "field_alignment": aligned / total, "entropy": nats / total}


def rewrite(trained: TrainedModel, texts: Sequence[str]) -> list[str]:
    """Return what the model makes of each date, greedily."""
    source, target = tokenizers_of(trained)
    options = BeamSearch(width=1, max_tokens=len(ISO_FIELDS) + 1, start_token_id=START, end_token_id=END)
    rewritten: list[str] = []
    for start in range(0, len(texts), _BATCH):
        source_ids, lengths = pad([source.encode(text).ids for text in texts[start : start + _BATCH]])
        found = search(trained.module, source_ids, lengths, options)
        rewritten += [target.decode(list(hypotheses[0].token_ids)) for hypotheses in found]
    return rewritten


def tokenizers_of(trained: TrainedModel) -> tuple[Tokenizer, Tokenizer]:
    """Return the tokenizers of what is written and of ISO dates."""
    return Tokenizer.from_str(trained.source_tokenizer.json), Tokenizer.from_str(trained.tokenizer.json)


def pairs_of(dates: Sequence[WrittenDate], source: Tokenizer, target: Tokenizer) -> list[Pair]:
    """Return one pair for each date."""
    return [Pair(tuple(source.encode(date.text).ids), tuple(target.encode(date.iso).ids)) for date in dates]
