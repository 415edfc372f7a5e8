"""Recipe `lm`: a decoder that learns to continue text, with a tokenizer of its own.

Shapes: B windows, T tokens, V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models import checkpoint
from models.checkpoint import TrainedModel
from models.checks import check_shares
from models.config import ConfigError, from_file
from models.decoder import Decoder, DecoderConfig
from models.training.baselines import bigram_loss, unigram_loss
from models.training.config import OptimiserConfig, RunConfig
from models.training.loop import CHECKPOINT, Task, train
from models.training.text import (
    TextConfig,
    consecutive_windows,
    encode_stream,
    random_windows,
    tokenizer_info,
    train_tokenizer,
)

BASELINES = "baselines.json"
EVALUATED_AT_ONCE = 16  # windows


@dataclass(frozen=True, slots=True, kw_only=True)
class LmConfig:
    """The recipe. Windows are `decoder.max_model_len` tokens long; the tokenizer learns `decoder.vocab_size` tokens."""

    run: RunConfig
    optimiser: OptimiserConfig
    text: TextConfig
    decoder: DecoderConfig
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self, "dropout")


CONFIG = LmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The stream (N,) of the documents that are never trained on, and how many characters they have."""

    stream: Tensor
    characters: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, documents: Sequence[str]) -> "Validation":
        """Encode documents; the end of one counts as a character."""
        return cls(
            stream=encode_stream(tokenizer, documents), characters=sum(len(document) + 1 for document in documents)
        )

    def per_character(self, loss: float) -> float:
        """Turn nats per token into nats per character."""
        return loss * (len(self.stream) - 1) / self.characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The token stream (N,) that is trained on, and the validation split."""

    tokenizer: Tokenizer
    training: Tensor
    validation: Validation


def run(config: LmConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of the last evaluation: nats per token and per character on the validation text.

    Raises:
        ConfigError: the text is too small for the configuration.
        FileNotFoundError: the text is not there.
    """
    corpus = _corpus(config, directory)
    baselines = _baselines(corpus, config.decoder.vocab_size)
    (directory / BASELINES).write_text(json.dumps(baselines, indent=2) + "\n", encoding="utf-8")
    print("baselines: " + ", ".join(f"{name} {value:.4f}" for name, value in baselines.items()))
    torch.manual_seed(config.run.seed)
    decoder = Decoder(config.decoder, dropout=config.dropout)
    batch_size, window = config.run.batch_size, config.decoder.max_model_len
    task = Task(
        module=decoder,
        loss=lambda: _loss(decoder, *random_windows(corpus.training, batch_size, window)),
        evaluate=lambda: figures(decoder, corpus.validation),
        save=lambda: checkpoint.save(_trained(decoder, corpus, config.text), directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return the figures on the validation text of lm.toml, whatever text the model was trained on."""
    text = from_file(LmConfig, Path(__file__).with_suffix(".toml")).text
    _, held_out = text.split()
    return figures(trained.module, Validation.of(Tokenizer.from_str(trained.tokenizer.json), held_out))


@torch.no_grad()
def figures(decoder: Decoder, validation: Validation) -> dict[str, float]:
    """Return nats per token, of which every one but the first is predicted once, and nats per character."""
    total, count = 0.0, 0
    for inputs, targets in consecutive_windows(validation.stream, EVALUATED_AT_ONCE, decoder.config.max_model_len):
        total += _loss(decoder, inputs, targets).item() * targets.numel()
        count += targets.numel()
    loss = total / count
    return {"validation_loss": loss, "validation_nats_per_character": validation.per_character(loss)}


def _corpus(config: LmConfig, directory: Path) -> Corpus:
    """Read and encode the text; the tokenizer is learnt from the training split once, and kept in the directory."""
    training, validation = config.text.split()
    path = directory / "tokenizer.json"
    if not path.is_file():
        train_tokenizer(training, config.decoder.vocab_size).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    corpus = Corpus(
        tokenizer=tokenizer,
        training=encode_stream(tokenizer, training),
        validation=Validation.of(tokenizer, validation),
    )
    window = config.decoder.max_model_len
    if len(corpus.training) <= window:
        raise ConfigError(f"decoder.max_model_len is {window}; the training text has {len(corpus.training)} tokens")
    return corpus


def _baselines(corpus: Corpus, vocab_size: int) -> dict[str, float]:
    baselines = {}
    for name, loss in (("unigram", unigram_loss), ("bigram", bigram_loss)):
        per_token = loss(corpus.training, corpus.validation.stream, vocab_size)
        baselines[f"{name}_loss"] = per_token
        baselines[f"{name}_nats_per_character"] = corpus.validation.per_character(per_token)
    return baselines


def _loss(decoder: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return mean nats per token of predicting `targets` (B, T) from `inputs` (B, T)."""
    return F.cross_entropy(decoder(inputs).flatten(0, 1), targets.flatten())


def _trained(decoder: Decoder, corpus: Corpus, text: TextConfig) -> TrainedModel:
    return TrainedModel(
        module=decoder,
        tokenizer=tokenizer_info(corpus.tokenizer),
        source="trained by the recipe lm",
        licence=text.licence,
        recipe="lm",
        data=text.source,
    )
