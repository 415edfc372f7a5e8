"""What a graph is checked and recorded on: texts, and the sources they are about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.runner import Runner
from export.source import Source

NUM_ROWS = 8
_SEED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text of token ids [N], and the source that it is about if there is one."""

    text: NDArray[np.int64]
    source: NDArray[Any] | None = None


Samples = Sequence[Sample]


def of_text(text: NDArray[np.int64]) -> Samples:
    """Return `NUM_ROWS` samples that begin at different places of one text."""
    return [Sample(text=text[row:]) for row in range(NUM_ROWS)]


@torch.inference_mode()
def about_sources(model: Any, source: Source, num_tokens: int, start_token_id: int) -> Samples:
    """Draw `NUM_ROWS` sources of different lengths, and write `num_tokens` tokens about each as the model would.

    It goes on behind an end token: what is checked is arithmetic, and long texts check more of it.
    """
    sources = source.draw(np.random.default_rng(_SEED), NUM_ROWS)
    texts = [_write(model, each, num_tokens, start_token_id) for each in sources]
    return [Sample(text=text, source=each) for text, each in zip(texts, sources, strict=True)]


def _write(model: Any, source: NDArray[Any], num_tokens: int, start_token_id: int) -> NDArray[np.int64]:
    state = model.begin(model.encode(torch.from_numpy(source)[None]))
    text = [start_token_id]
    while len(text) < num_tokens:
        logits, state = model.decode(torch.tensor([text[-1:]]), state)
        text.append(int(logits[0, -1].argmax()))
    return np.array(text)


def begin(runner: Runner, samples: Samples) -> None:
    """Let each row be about its sample's source."""
    for row, sample in enumerate(samples):
        if sample.source is not None:
            runner.begin(sample.source, row=row)
