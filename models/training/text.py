"""Texts as token streams: documents from a file, a byte-level BPE tokenizer trained on them, windows of tokens.

Shapes: N tokens of a stream, B windows, T tokens of a window.
"""

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from models.checkpoint import TokenizerInfo
from models.config import ConfigError

DATA = Path(__file__).parents[1] / "data"
END_OF_TEXT = "<|endoftext|>"


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

    def split(self) -> tuple[list[str], list[str]]:
        """Return the documents to train on, and those that are held out.

        Raises:
            ConfigError: the text has no more documents than are held out.
            FileNotFoundError: the text is not there.
        """
        documents, held_out = read_documents(self.file), self.validation_documents
        if len(documents) <= held_out:
            raise ConfigError(f"text.validation_documents is {held_out}; the text has {len(documents)} documents")
        return documents[:-held_out], documents[-held_out:]


def read_documents(file: str) -> list[str]:
    """Return the documents of a text file, gzipped or not: one per line, empty lines left out.

    A bare file name means a file of models/data; anything else is a path.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = DATA / file if Path(file).name == file else Path(file)
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [line for line in text.split("\n") if line.strip()]


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` byte-level BPE tokens; the end-of-text token is 0, and any text can be encoded.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the end-of-text token, or the documents are too
            small for so many tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"vocab_size is {vocab_size}; bytes and the end-of-text token alone are {len(alphabet) + 1}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives only {tokenizer.get_vocab_size()} tokens; vocab_size is {vocab_size}")
    return tokenizer


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Return what a checkpoint keeps of a tokenizer of streams: the end of a text begins and ends them."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=end,
        eos_token_ids=(end,),
        pad_token_id=None,
        add_bos=False,
        chat_template=None,
    )


def encode_stream(tokenizer: Tokenizer, documents: Sequence[str]) -> Tensor:
    """Return one stream of tokens (N,), int64, with the end-of-text token before, between and after the documents."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    token_ids = [separator]
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        token_ids += [*encoding.ids, separator]
    return torch.tensor(token_ids)


def random_windows(stream: Tensor, num_windows: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Draw windows with torch's global generator; return inputs and their next tokens, both (B, T)."""
    starts = torch.randint(len(stream) - num_tokens, (num_windows, 1))
    windows = stream[starts + torch.arange(num_tokens + 1)]
    return windows[:, :-1], windows[:, 1:]


def consecutive_windows(stream: Tensor, num_windows: int, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a stream so that every token but the first is predicted once; yield batches as `random_windows` does.

    The last batch may be smaller, and its single window shorter.
    """
    whole = (len(stream) - 1) // num_tokens
    inputs = stream[: whole * num_tokens].reshape(whole, num_tokens)
    targets = stream[1 : whole * num_tokens + 1].reshape(whole, num_tokens)
    yield from zip(inputs.split(num_windows), targets.split(num_windows), strict=True)
    if (rest := stream[whole * num_tokens :]).numel() > 1:
        yield rest[None, :-1], rest[None, 1:]
