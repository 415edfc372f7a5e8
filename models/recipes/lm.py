"""Recipe `lm`: a decoder that learns to continue text, with a tokenizer of its own.

Shapes: B windows, T tokens, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models import checkpoint
from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder import Decoder, DecoderConfig
from models.training.baselines import bigram_loss, unigram_loss
from models.training.config import ConfigError, OptimiserConfig, RunConfig
from models.training.loop import Task, train
from models.training.text import (
    END_OF_TEXT,
    consecutive_windows,
    encode_stream,
    random_windows,
    read_documents,
    train_tokenizer,
)

CHECKPOINT = "checkpoint"
BASELINES = "baselines.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Text, one document per line; the last `validation_documents` are never trained on.

    `file` is a name in models/data or a path. `source` and `licence` go into the checkpoint.
    """

    file: str
    validation_documents: int
    source: str
    licence: str

    def __post_init__(self) -> None:
        if self.validation_documents < 1:
            raise ConfigError(f"validation_documents is {self.validation_documents}; it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LmConfig:
    """The recipe. Windows are `decoder.max_model_len` tokens long; the tokenizer learns `decoder.vocab_size` tokens."""

    run: RunConfig
    optimiser: OptimiserConfig
    text: TextConfig
    decoder: DecoderConfig
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must lie in [0, 1)")


CONFIG = LmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token streams (N,) of both splits, and how many characters the validation split has."""

    tokenizer: Tokenizer
    training: Tensor
    validation: Tensor
    validation_characters: int


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
        evaluate=lambda: _evaluate(decoder, corpus, batch_size),
        save=lambda: checkpoint.save(_trained(decoder, corpus, config.text), directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def _corpus(config: LmConfig, directory: Path) -> Corpus:
    """Read and encode the text; the tokenizer is learnt from the training split once, and kept in the directory."""
    documents, held_out = read_documents(config.text.file), config.text.validation_documents
    if len(documents) <= held_out:
        raise ConfigError(f"text.validation_documents is {held_out}; the text has {len(documents)} documents")
    training, validation = documents[:-held_out], documents[-held_out:]
    path = directory / "tokenizer.json"
    if not path.is_file():
        train_tokenizer(training, config.decoder.vocab_size).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    corpus = Corpus(
        tokenizer=tokenizer,
        training=encode_stream(tokenizer, training),
        validation=encode_stream(tokenizer, validation),
        validation_characters=sum(len(document) + 1 for document in validation),
    )
    window = config.decoder.max_model_len
    if len(corpus.training) <= window:
        raise ConfigError(f"decoder.max_model_len is {window}; the training text has {len(corpus.training)} tokens")
    return corpus


def _baselines(corpus: Corpus, vocab_size: int) -> dict[str, float]:
    figures = {}
    for name, loss in (("unigram", unigram_loss), ("bigram", bigram_loss)):
        per_token = loss(corpus.training, corpus.validation, vocab_size)
        figures |= {f"{name}_loss": per_token, f"{name}_nats_per_character": _per_character(per_token, corpus)}
    return figures


def _loss(decoder: Decoder, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return mean nats per token of predicting `targets` (B, T) from `inputs` (B, T)."""
    return F.cross_entropy(decoder(inputs).flatten(0, 1), targets.flatten())


def _evaluate(decoder: Decoder, corpus: Corpus, batch_size: int) -> dict[str, float]:
    total, count = 0.0, 0
    for inputs, targets in consecutive_windows(corpus.validation, batch_size, decoder.config.max_model_len):
        total += _loss(decoder, inputs, targets).item() * targets.numel()
        count += targets.numel()
    loss = total / count
    return {"validation_loss": loss, "validation_nats_per_character": _per_character(loss, corpus)}


def _per_character(loss: float, corpus: Corpus) -> float:
    """Turn nats per token into nats per character; the end of a document counts as one."""
    return loss * (len(corpus.validation) - 1) / corpus.validation_characters


def _trained(decoder: Decoder, corpus: Corpus, text: TextConfig) -> TrainedModel:
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    tokenizer = TokenizerInfo(
        json=corpus.tokenizer.to_str(),
        bos_token_id=end,
        eos_token_ids=(end,),
        pad_token_id=None,
        add_bos=False,
        chat_template=None,
    )
    return TrainedModel(
        module=decoder,
        tokenizer=tokenizer,
        source="trained by the recipe lm",
        licence=text.licence,
        recipe="lm",
        data=text.source,
    )
