"""What counting alone achieves: unigram, bigram and two-sided models, so that a model's figures mean something.

Shapes: N tokens of a stream, V vocabulary, B windows, T tokens of a window.
"""

import torch
import torch.nn.functional as F
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


_NEIGHBOURS = ((), (-1,), (-1, 1), (-1, 1, 2), (-2, -1, 1), (-2, -1, 1, 2))
"""What a two-sided guess looks at, from the least telling to the most."""


def two_sided_guesses(training: Tensor, windows: Tensor, vocab_size: int) -> Tensor:
    """Guess every token of windows (B, T) by what stood most often between the same neighbours in training (N,).

    The neighbours are two on each side, or as many of them as were ever seen together; a neighbour that is hidden by a
    token which training does not have was never seen. Returns (B, T), ids below `vocab_size`.
    """
    base, guesses = vocab_size + 1, torch.zeros_like(windows)  # one id more, for what lies beyond a window
    for offsets in _NEIGHBOURS:
        contexts = _contexts(training[None], offsets, base)[0]
        # The ends of the text are left out: what lies beyond it is not what lies beyond a window.
        found, guess = _most_frequent(contexts[2:-2], training[2:-2], _contexts(windows, offsets, base), base)
        guesses = torch.where(found, guess, guesses)
    return guesses


def _contexts(windows: Tensor, offsets: tuple[int, ...], base: int) -> Tensor:
    """Return one number for the neighbours of each token of windows (B, T)."""
    contexts, padded = torch.zeros_like(windows), F.pad(windows, (2, 2), value=base - 1)
    for offset in offsets:
        contexts = contexts * base + padded[:, 2 + offset : 2 + offset + windows.shape[1]]
    return contexts


def _most_frequent(contexts: Tensor, tokens: Tensor, asked: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """Return whether each of `asked` is among `contexts` (N,), and which of `tokens` (N,) it came with most often."""
    pairs, counts = torch.unique(contexts * base + tokens, return_counts=True)
    pairs = pairs[counts.argsort(stable=True)]
    pairs = pairs[(pairs // base).argsort(stable=True)]  # by context, the most frequent last
    owners = pairs // base
    last = (torch.searchsorted(owners, asked.contiguous(), right=True) - 1).clamp(min=0)
    return owners[last] == asked, pairs[last] % base
