"""Token streams, the windows cut from them, and baselines against counting by hand."""

import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer

from models.training import text
from models.training.baselines import PRIOR_STRENGTHS, bigram_loss, unigram_loss


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(["the cat sat on the mat", "the dog sat on the cat"], 270)


def test_any_text_survives_a_tokenizer_trained_on_little(tokenizer):
    assert tokenizer.get_vocab_size() == 270
    assert tokenizer.token_to_id(text.END_OF_TEXT) == 0
    for sample in ("the cat", "  naïve 日本語 \U0001f600\n\t12", ""):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    again = text.train_tokenizer(["the cat sat on the mat", "the dog sat on the cat"], 270)
    assert again.to_str() == tokenizer.to_str()


def test_a_stream_separates_documents(tokenizer):
    documents = ["the cat", "the dog sat"]
    stream = text.encode_stream(tokenizer, documents).tolist()
    assert [stream[0], stream[-1], stream.count(0)] == [0, 0, 3]
    middle = stream.index(0, 1)
    assert [tokenizer.decode(stream[1:middle]), tokenizer.decode(stream[middle + 1 : -1])] == documents


@pytest.mark.parametrize("length", [2, 9, 13, 14, 40])
def test_consecutive_windows_predict_every_token_but_the_first_once(length):
    stream = torch.arange(length)
    batches = list(text.consecutive_windows(stream, 2, 4))
    assert torch.equal(torch.cat([targets.flatten() for _, targets in batches]), stream[1:])
    for inputs, targets in batches:
        assert torch.equal(inputs + 1, targets)
        assert inputs.shape[0] <= 2
        assert inputs.shape[1] <= 4


def test_random_windows_lie_inside_the_stream_and_reach_its_end():
    torch.manual_seed(0)
    inputs, targets = text.random_windows(torch.arange(20), 500, 6)
    assert inputs.shape == targets.shape == (500, 6)
    assert torch.equal(inputs + 1, targets)
    assert (inputs.min(), targets.max()) == (0, 19)


def test_documents_are_lines_of_a_file_gzipped_or_not(tmp_path):
    import gzip

    (tmp_path / "a.txt").write_text("one\n\ntwo\x85still two\n", encoding="utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo"))
    assert text.read_documents(str(tmp_path / "a.txt")) == ["one", "two\x85still two"]
    assert text.read_documents(str(tmp_path / "a.txt.gz")) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        text.read_documents("absent.txt")


def test_baselines_equal_counting_by_hand():
    generator = torch.Generator().manual_seed(0)
    training, validation = (torch.randint(5, (size,), generator=generator) for size in (200, 40))
    counts, pairs = Counter(training.tolist()), Counter(zip(training[:-1].tolist(), training[1:].tolist(), strict=True))
    probability = {token: (counts[token] + 1) / 205 for token in range(5)}
    following = validation.tolist()[1:]
    expected = -sum(math.log(probability[token]) for token in following) / 39
    assert unigram_loss(training, validation, 5) == pytest.approx(expected)
    starts = Counter(training[:-1].tolist())
    losses = [
        -sum(
            math.log((pairs[a, b] + strength * probability[b]) / (starts[a] + strength))
            for a, b in zip(validation.tolist(), following, strict=False)
        )
        / 39
        for strength in PRIOR_STRENGTHS
    ]
    assert bigram_loss(training, validation, 5) == pytest.approx(min(losses))


def test_a_tokenizer_read_back_from_its_file_is_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).to_str() == tokenizer.to_str()
