"""Pairs of sequences: how they are put side by side, drawn, and judged."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from models.training.pairs import END, PAD, START, Pair, collate, mean_loss, pad, pair_loss, random_batch

PAIRS = [Pair(source=(3,) * size, target=tuple(range(3, 3 + (7 * size) % 5))) for size in range(1, 12)]


class Bigrams(nn.Module):
    """Logits that depend on the token read, and on the length of the source so that batches must keep pairs whole."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 9, 9, generator=torch.Generator().manual_seed(0)))

    def forward(self, source, inputs, source_lengths):
        assert torch.equal((source != PAD).sum(1), source_lengths)
        return self.table[source_lengths][torch.arange(len(inputs))[:, None], inputs]


def test_a_batch_shows_what_precedes_and_asks_for_what_follows():
    batch = collate([Pair((7, 8, 9), (3, 4)), Pair((5,), ())])
    assert batch.source.tolist() == [[7, 8, 9], [5, PAD, PAD]]
    assert batch.source_lengths.tolist() == [3, 1]
    assert batch.inputs.tolist() == [[START, 3, 4], [START, PAD, PAD]]
    assert batch.labels.tolist() == [[3, 4, END], [END, PAD, PAD]]
    assert all(tensor.dtype == torch.int64 for tensor in batch)
    empty, lengths = pad([(), ()])
    assert (empty.shape, empty.dtype, lengths.tolist()) == ((2, 0), torch.int64, [0, 0])


def test_every_pair_is_drawn_with_the_same_probability_whatever_its_length():
    torch.manual_seed(0)
    seen, batches = Counter(), 6000
    for _ in range(batches):
        batch = random_batch(PAIRS, 4)
        seen.update(batch.source_lengths.tolist())
    # A pair comes up to four times in a batch and often beside its like: the variance of its count in one batch is
    # below 4 * 4, so six standard errors are below 6 * 4 * sqrt(batches).
    expected = 4 * batches / len(PAIRS)
    assert sum(seen.values()) == 4 * batches
    assert set(seen) == set(range(1, 12))
    for count in seen.values():
        assert abs(count - expected) < 6 * 4 * math.sqrt(batches)
        assert abs(count - expected) < 0.1 * expected


def test_a_batch_holds_pairs_of_similar_lengths():
    torch.manual_seed(0)
    spread = [int(lengths.max() - lengths.min()) for lengths in (random_batch(PAIRS, 4)[1] for _ in range(200))]
    independent = [int(lengths.max() - lengths.min()) for lengths in torch.randint(1, 12, (200, 4))]
    assert sum(spread) < 0.4 * sum(independent)


def test_the_loss_is_the_mean_over_real_tokens():
    model = Bigrams()
    total, count = 0.0, 0
    for pair in PAIRS:
        for read, told in zip((START, *pair.target), (*pair.target, END), strict=True):
            total -= model.table[len(pair.source)].log_softmax(-1)[read, told].item()
            count += 1
    assert pair_loss(model, collate(PAIRS)).item() == pytest.approx(total / count, rel=1e-5)
    for batch_size in (1, 3, 100):
        assert mean_loss(model, PAIRS, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_a_smoothed_label_shares_its_probability_among_all_tokens():
    model, pair = Bigrams(), Pair((3,), ())
    predicted = model.table[1].log_softmax(-1)[START]
    expected = -0.9 * predicted[END] - 0.1 * predicted.mean()
    actual = pair_loss(model, collate([pair]), label_smoothing=0.1)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
