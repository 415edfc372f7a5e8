"""Texts and pairs of texts for encoders, cut as the tokenizers library cuts them."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from attendant.bundle import Vocabulary
from service.text import TextCodec
from service.text.encoded import lengths_within

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]


def reference():
    tokenizer = Tokenizer(models.WordLevel(dict(zip(WORDS, range(len(WORDS)), strict=True)), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@given(st.integers(1, 30), st.integers(1, 30), st.integers(5, 40))
def test_a_pair_is_cut_as_the_tokenizers_library_does(tmp_path_factory, first, second, limit):
    directory = tmp_path_factory.getbasetemp() / "codec"
    directory.mkdir(exist_ok=True)
    tokenizer = reference()
    tokenizer.save(str(directory / "tokenizer.json"))
    codec = TextCodec(directory, Vocabulary(file="tokenizer.json", size=len(WORDS)))
    texts = ("a " * first, "b " * second)
    found = codec.encode_text(*texts, max_tokens=limit)
    tokenizer.enable_truncation(limit, strategy="longest_first")
    expected = tokenizer.encode(*texts)
    assert (list(found.token_ids), list(found.segment_ids)) == (expected.ids, expected.type_ids)
    assert list(found.offsets) == expected.offsets
    assert [int(flag) for flag in found.is_special] == expected.special_tokens_mask
    assert found.truncated == (first + second + 3 > limit)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 100))
def test_what_is_kept_fits_and_wastes_nothing(first, second, limit):
    kept = lengths_within(first, second, limit)
    assert kept[0] <= first and kept[1] <= second
    assert sum(kept) == min(first + second, limit)
