"""The committed texts that exports are measured on, as tokens of the model at hand. See data/README.md."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_DATA = Path(__file__).parent / "data"
CALIBRATION = _DATA / "calibration.txt"
QUALITY = _DATA / "quality.txt"
_NUM_WINDOWS = 40


def tokens_of(path: Path, tokenizer_json: str) -> NDArray[np.int64]:
    """Return the token ids of a text file, without the special tokens a tokenizer may put around a text."""
    encoding = Tokenizer.from_str(tokenizer_json).encode(path.read_text("utf-8"), add_special_tokens=False)
    return np.array(encoding.ids, np.int64)


def windows_of(path: Path, tokenizer_json: str, max_len: int) -> list[NDArray[np.int64]]:
    """Return pieces of a text file, of 1 to 100 words, as a model is given them: with their special tokens.

    Args:
        path: of the text.
        tokenizer_json: what reads it.
        max_len: where a piece is cut, in tokens.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_len)
    words = path.read_text("utf-8").split()
    lengths = np.linspace(1, 100, _NUM_WINDOWS).astype(int)
    starts = lengths.cumsum() % (len(words) - int(lengths.max()))
    pieces = [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]
    return [np.array(each.ids, np.int64) for each in tokenizer.encode_batch(pieces) if each.ids]
