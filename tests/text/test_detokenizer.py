"""Deltas concatenate to the text of the whole, and no delta ends inside a character."""

import functools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from attendant.bundle import BundleError
from models.token_texts import token_texts
from service.text.detokenizer import Detokenizers

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)
TEXT = st.text() | st.text(alphabet="ab .,'▁é€日🚀\ufffd\n", max_size=40)


@functools.cache
def detokenizers(tokenizer: Tokenizer) -> Detokenizers:
    return Detokenizers(tokenizer)


def deltas(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = detokenizers(tokenizer).open()
    return [*(detokenizer.append(token_id) for token_id in token_ids), detokenizer.flush()]


@PROPERTY
@given(data=st.data())
def test_deltas_of_any_ids_concatenate_to_their_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    size = tokenizer.get_vocab_size()
    anywhere = st.integers(0, size + 3)  # a model may know ids that its tokenizer does not
    low = st.integers(0, min(size - 1, 300))  # special tokens and single bytes
    ids = data.draw(st.lists(anywhere | low, max_size=40))
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@PROPERTY
@given(text=TEXT)
def test_deltas_of_a_text_concatenate_to_it_and_never_cut_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    parts = deltas(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(parts) == whole
    if "\ufffd" not in whole:  # so no part may show half a character as U+FFFD
        assert not any("\ufffd" in part for part in parts)


def test_a_character_of_several_tokens_comes_whole_with_its_last_one(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🦩", add_special_tokens=False).ids
    assert len(ids) > 2
    assert deltas(smollm2, ids) == [""] * (len(ids) - 1) + ["🦩", ""]
    assert deltas(smollm2, ids[:-1])[-1] == "\ufffd"


def test_special_tokens_have_no_text_and_do_not_part_a_character(smollm2: Tokenizer) -> None:
    first, *rest = smollm2.encode("🦩", add_special_tokens=False).ids
    end = smollm2.token_to_id("<|im_end|>")
    assert "".join(deltas(smollm2, [end, first, end, *rest, end])) == "🦩"


def test_streams_of_one_tokenizer_do_not_disturb_each_other(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("日本語 🦩 naïve", add_special_tokens=False).ids
    streams = [detokenizers(smollm2).open() for _ in range(3)]
    texts = [""] * len(streams)
    for step in range(len(ids) + len(streams)):
        for i, stream in enumerate(streams):
            if 0 <= step - i < len(ids):
                texts[i] += stream.append(ids[step - i])
    assert texts == ["日本語 🦩 naïve"] * len(streams)


def test_a_decoder_that_cannot_be_followed_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for decoder in (decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")])):
        tokenizer.decoder = decoder
        with pytest.raises(BundleError, match="cannot be followed token by token"):
            Detokenizers(tokenizer)


def test_a_token_costs_microseconds_however_long_the_stream(tokenizer: Tokenizer) -> None:
    ids = [i for i in range(min(300, tokenizer.get_vocab_size()))] * 100
    stream = detokenizers(tokenizer).open()
    for token_id in ids:
        stream.append(token_id)
    begin = time.perf_counter()
    for token_id in ids:
        stream.append(token_id)
    assert (time.perf_counter() - begin) / len(ids) < 50e-6  # measured: 0.2 to 0.4


def test_labels_of_tokens_are_those_of_the_models_own_heat_maps(tokenizer: Tokenizer) -> None:
    token_ids = range(tokenizer.get_vocab_size() + 2)
    labels = [detokenizers(tokenizer).label(token_id) for token_id in token_ids]
    assert labels == token_texts(tokenizer, token_ids)
