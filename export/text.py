"""The committed texts that exports are measured on, as tokens of the model at hand. See data/README.md."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_DATA = Path(__file__).parent / "data"
CALIBRATION = _DATA / "calibration.txt"
QUALITY = _DATA / "quality.txt"


def tokens_of(path: Path, tokenizer_json: str) -> NDArray[np.int64]:
    """Return the token ids of a text file, without the special tokens a tokenizer may put around a text."""
    encoding = Tokenizer.from_str(tokenizer_json).encode(path.read_text("utf-8"), add_special_tokens=False)
    return np.array(encoding.ids, np.int64)
