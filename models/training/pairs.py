"""Pairs of sequences: batches of similar lengths, and the loss of predicting each target from its source.

Shapes: B pairs, S source tokens, T target tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD, START, END = 0, 1, 2
"""Token ids that every vocabulary of pairs shares; words come after."""
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_POOL = 8  # batches drawn at once and sorted by length, of which one is used


class Pair(NamedTuple):
    """Token ids of a source and of its target, without start and end."""

    source: tuple[int, ...]
    target: tuple[int, ...]


class Batch(NamedTuple):
    """Padded pairs: the decoder reads `inputs` (a start token, then the target) and predicts `labels`, end included.

    source (B, S), source_lengths (B,), inputs (B, T), labels (B, T), all int64; labels are PAD where nothing counts.
    """

    source: Tensor
    source_lengths: Tensor
    inputs: Tensor
    labels: Tensor


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return sequences side by side, right-padded with PAD: (B, S) int64, and their lengths (B,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD), lengths


def collate(pairs: Sequence[Pair]) -> Batch:
    """Put pairs into one batch."""
    source, source_lengths = pad([pair.source for pair in pairs])
    return Batch(source, source_lengths, *inputs_and_labels([pair.target for pair in pairs]))


def inputs_and_labels(targets: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return what a decoder reads of targets and what it predicts, as in `Batch`: both (B, T)."""
    inputs, _ = pad([(START, *target) for target in targets])
    labels, _ = pad([(*target, END) for target in targets])
    return inputs, labels


def random_batch(pairs: Sequence[Pair], batch_size: int) -> Batch:
    """Draw pairs of similar lengths with torch's global generator, every pair with the same probability."""
    drawn = [pairs[index] for index in torch.randint(len(pairs), (_POOL * batch_size,)).tolist()]
    drawn.sort(key=lambda pair: (len(pair.source), len(pair.target)))
    start = int(torch.randint(_POOL, ())) * batch_size
    return collate(drawn[start : start + batch_size])


def pair_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Return mean nats per target token, end tokens included.

    Args:
        model: takes source (B, S), inputs (B, T) and source lengths (B,), returns logits (B, T, V).
        batch: the pairs.
        label_smoothing: the share of probability that the label gives to all tokens alike.
    """
    logits = model(batch.source, batch.inputs, batch.source_lengths)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=PAD, label_smoothing=label_smoothing
    )


def mean_loss(model: nn.Module, pairs: Sequence[Pair], batch_size: int) -> float:
    """Return mean nats per target token over all pairs."""
    total, count = 0.0, 0
    ordered = sorted(pairs, key=lambda pair: (len(pair.source), len(pair.target)))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size])
        tokens = int((batch.labels != PAD).sum())
        total += pair_loss(model, batch).item() * tokens
        count += tokens
    return total / count
