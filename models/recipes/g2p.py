"""Recipe `g2p`: an encoder-decoder that learns how English words are pronounced, from the CMU dictionary.

Spelling goes in letter by letter, phonemes (ARPAbet, without stress) come out. The split of the dictionary is part of
the data: whole headwords, so that no pronunciation of a test word was ever seen.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from models import checkpoint
from models.beam import BeamSearch, search
from models.checkpoint import TrainedModel
from models.checks import check_shares
from models.config import ConfigError
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.training.characters import character_tokenizer, tokenizer_info, word_tokenizer
from models.training.config import OptimiserConfig, RunConfig
from models.training.edit_distance import edit_distance
from models.training.loop import CHECKPOINT, Task, train
from models.training.pairs import END, START, Pair, mean_loss, pad, pair_loss, random_batch
from models.training.text import DATA

FILE = "cmudict.tsv.gz"
MAX_PHONEMES = 30
_WORDS_WHILE_TRAINING = 512
_SEARCH_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class G2pConfig:
    """The recipe; vocabulary sizes are those of the dictionary's letters and phonemes, special tokens included."""

    run: RunConfig
    optimiser: OptimiserConfig
    model: EncoderDecoderConfig
    dropout: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_shares(self, "dropout", "label_smoothing")


CONFIG = G2pConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """A headword and all its pronunciations, phonemes separated by spaces."""

    spelling: str
    pronunciations: tuple[str, ...]


def read_words(part: str) -> list[Word]:
    """Return the words of one part of the dictionary: "training", "validation" or "test"."""
    lines = gzip.decompress((DATA / FILE).read_bytes()).decode("utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return [Word(spelling=row[1], pronunciations=tuple(row[2:])) for row in rows if row[0] == part]


def run(config: G2pConfig, directory: Path) -> dict[str, float]:
    """Train in `directory`, continuing what is there; the checkpoint is its subdirectory `checkpoint`.

    Returns the figures of the last evaluation: nats per phoneme and greedy word error rate on validation words.

    Raises:
        ConfigError: vocabulary sizes are not those of the dictionary.
    """
    words = read_words("training")
    letters = character_tokenizer((word.spelling for word in words), lowercase=True)
    phonemes = word_tokenizer(spoken for word in words for spoken in word.pronunciations)
    for name, given, needed in (
        ("model.encoder.vocab_size", config.model.encoder.vocab_size, letters.get_vocab_size()),
        ("model.decoder.vocab_size", config.model.decoder.vocab_size, phonemes.get_vocab_size()),
    ):
        if given != needed:
            raise ConfigError(f"{name} is {given}; the dictionary needs {needed}")
    training, held_out = pairs_of(words, letters, phonemes), read_words("validation")
    validation = pairs_of(held_out, letters, phonemes)
    torch.manual_seed(config.run.seed)
    model = EncoderDecoder(config.model, dropout=config.dropout)
    trained = TrainedModel(
        module=model,
        tokenizer=tokenizer_info(phonemes),
        source_tokenizer=tokenizer_info(letters),
        source="trained by the recipe g2p",
        licence="BSD-2-Clause",
        recipe="g2p",
        data="CMU Pronouncing Dictionary (models/data/README.md)",
    )

    def figures() -> dict[str, float]:
        loss = mean_loss(model, validation, config.run.batch_size)
        return {"validation_loss": loss} | error_rates(trained, held_out[:: len(held_out) // _WORDS_WHILE_TRAINING], 1)

    batch_size, smoothing = config.run.batch_size, config.label_smoothing
    task = Task(
        module=model,
        loss=lambda: pair_loss(model, random_batch(training, batch_size), label_smoothing=smoothing),
        evaluate=figures,
        save=lambda: checkpoint.save(trained, directory / CHECKPOINT),
    )
    return train(task, config.run, config.optimiser, directory)


def evaluate(trained: TrainedModel) -> dict[str, float]:
    """Return word and phoneme error rates (shares) on the test words, with a beam of 5."""
    return error_rates(trained, read_words("test"), 5)


def pairs_of(words: Sequence[Word], letters: Tokenizer, phonemes: Tokenizer) -> list[Pair]:
    """Return one pair for each pronunciation of each word."""
    return [
        Pair(tuple(letters.encode(word.spelling).ids), tuple(phonemes.encode(spoken).ids))
        for word in words
        for spoken in word.pronunciations
    ]


def error_rates(trained: TrainedModel, words: Sequence[Word], width: int) -> dict[str, float]:
    """Return the share of words with no right pronunciation, and of phonemes to edit towards the nearest one."""
    wrong = edits = total = 0
    for word, spoken in zip(words, pronounce(trained, [word.spelling for word in words], width), strict=True):
        listed = [pronunciation.split() for pronunciation in word.pronunciations]
        distance, length = min((edit_distance(spoken, right), len(right)) for right in listed)
        wrong += distance > 0
        edits += distance
        total += length
    return {"word_error_rate": wrong / len(words), "phoneme_error_rate": edits / total}


def pronounce(trained: TrainedModel, spellings: Sequence[str], width: int) -> list[list[str]]:
    """Return the phonemes of each spelling, in order, found by a beam search of the given width."""
    letters = Tokenizer.from_str(trained.source_tokenizer.json)
    phonemes = Tokenizer.from_str(trained.tokenizer.json)
    options = BeamSearch(width=width, max_tokens=MAX_PHONEMES, start_token_id=START, end_token_id=END)
    order = sorted(range(len(spellings)), key=lambda index: len(spellings[index]))
    spoken: list[list[str]] = [[] for _ in spellings]
    for start in range(0, len(order), _SEARCH_BATCH):
        indices = order[start : start + _SEARCH_BATCH]
        source, lengths = pad([letters.encode(spellings[index]).ids for index in indices])
        for index, found in zip(indices, search(trained.module, source, lengths, options), strict=True):
            spoken[index] = [phonemes.id_to_token(token) for token in found[0].token_ids]
    return spoken
