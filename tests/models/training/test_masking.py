"""What a masked language model is asked, and the counting that it has to beat."""

from collections import Counter

import torch

from models.training.baselines import two_sided_guesses
from models.training.masking import mask_tokens, select

MASK, SPECIAL, ORDINARY = 99, (0, 1, 99), torch.arange(2, 99)


def test_of_the_ordinary_tokens_15_percent_are_selected_and_hidden_as_in_bert():
    torch.manual_seed(0)
    token_ids = torch.randint(100, (400, 500))
    copy = token_ids.clone()
    inputs, selected = mask_tokens(token_ids, MASK, ORDINARY)
    assert torch.equal(token_ids, copy)
    ordinary = torch.isin(token_ids, ORDINARY)
    assert not (selected & ~ordinary).any()  # neither padding nor others with a meaning of their own
    assert abs(selected.sum() / ordinary.sum() - 0.15) < 0.01
    assert torch.equal(inputs[~selected], token_ids[~selected])
    masked, kept = inputs[selected] == MASK, inputs[selected] == token_ids[selected]
    random = ~masked & ~kept
    for share, expected in ((masked, 0.8), (kept, 0.1), (random, 0.1)):
        assert abs(share.double().mean() - expected) < 0.01
    drawn = inputs[selected][random]
    assert torch.isin(drawn, ORDINARY).all()
    assert len(drawn.unique()) == len(ORDINARY)


def test_what_is_selected_repeats_under_its_generator():
    token_ids = torch.randint(100, (20, 50), generator=torch.Generator().manual_seed(1))
    one, two, three = (select(token_ids, ORDINARY, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_text_of_special_tokens_alone_is_never_asked():
    inputs, selected = mask_tokens(torch.tensor([list(SPECIAL) * 40]), MASK, ORDINARY)
    assert not selected.any()
    assert inputs.tolist() == [list(SPECIAL) * 40]


def test_two_sided_guesses_equal_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    training = torch.randint(4, (300,), generator=generator)
    windows = torch.randint(4, (6, 12), generator=generator)
    windows[torch.rand(6, 12, generator=generator) < 0.2] = 5  # hidden: training has no such token
    guesses = two_sided_guesses(training, windows, 6)
    stream = training.tolist()
    for row, window in enumerate(windows.tolist()):
        for place in range(12):
            for offsets in ((-2, -1, 1, 2), (-2, -1, 1), (-1, 1, 2), (-1, 1), (-1,), ()):
                around = [window[place + o] if 0 <= place + o < 12 else None for o in offsets]
                counts = Counter(
                    token
                    for index, token in enumerate(stream[2:-2], start=2)
                    if [stream[index + o] for o in offsets] == around
                )
                if counts:
                    break
            assert counts[int(guesses[row, place])] == max(counts.values())
