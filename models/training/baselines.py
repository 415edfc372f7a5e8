"""What counting alone achieves: unigram and bigram models, so that a language model's loss means something.

Shapes: N tokens of a stream, V vocabulary.
"""

import torch
from torch import Tensor

PRIOR_STRENGTHS = (10.0, 30.0, 100.0, 300.0, 1000.0)


def unigram_loss(training: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return nats per token of predicting validation[1:] by how often tokens occur in training, one added to each."""
    return -_unigram(training, vocab_size).log()[validation[1:]].mean().item()


def bigram_loss(training: Tensor, validation: Tensor, vocab_size: int) -> float:
    """Return nats per token of predicting each of validation[1:] by what followed its predecessor in training.

    Counts are smoothed towards the unigram model; the strength is the best for the validation text itself, which
    flatters this baseline a little.
    """
    unigram = _unigram(training, vocab_size)
    pairs = torch.bincount(training[:-1] * vocab_size + training[1:], minlength=vocab_size**2)
    previous, current = validation[:-1], validation[1:]
    joint = pairs[previous * vocab_size + current].double()
    totals = pairs.reshape(vocab_size, vocab_size).sum(1)[previous].double()
    losses = [
        -((joint + strength * unigram[current]) / (totals + strength)).log().mean().item()
        for strength in PRIOR_STRENGTHS
    ]
    return min(losses)


def _unigram(training: Tensor, vocab_size: int) -> Tensor:
    counts = torch.bincount(training, minlength=vocab_size).double() + 1
    return counts / counts.sum()
