"""Texts as token streams: documents from a file, a byte-level BPE tokenizer trained on them, windows of tokens.

Shapes: N tokens of a stream, B windows, T tokens of a window.
"""

import gzip
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
END_OF_TEXT = "<|endoftext|>"


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
