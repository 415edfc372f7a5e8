"""However a stream is cut into steps, its deltas are the same text and tokens; stop strings end it exactly."""

import random

import pytest

from attendant.bundle import Manifest
from attendant.v1 import generation_pb2 as pb
from service.rpc.answer import Answer
from service.rpc.convert import Options, read_options
from service.scheduling.request import Finish, FinishReason, Token
from service.text import TextCodec
from service.token_stream import StepTokens

TEXT = "The quick brown fox — grüße, 日本語 👩‍👩‍👧 — jumps over the lazy dog."
LENGTH = Finish(reason=FinishReason.LENGTH, queue_seconds=0, prefill_seconds=0, decode_seconds=0)
EOS = Finish(reason=FinishReason.EOS, queue_seconds=0, prefill_seconds=0, decode_seconds=0)


def options(manifest: Manifest, *strings: str, min_tokens: int = 0, logprobs: bool = False) -> Options:
    message = pb.GenerateRequest(
        prompt="x",
        stop=pb.StopConditions(strings=strings),
        sampling=pb.SamplingParams(min_tokens=min_tokens),
        output=pb.OutputOptions(logprobs=logprobs),
    )
    return read_options(message, manifest)


def deltas(
    codec: TextCodec, wanted: Options, token_ids: tuple[int, ...], finish: Finish, cuts: random.Random
) -> tuple[Answer, list[pb.Delta]]:
    """Feed tokens in random groups until the answer is complete."""
    answer = Answer(codec, wanted)
    found = []
    rest = [Token(token_id, -1.0, ((7, -0.5),)) for token_id in token_ids]
    while rest and answer.finish_reason is None:
        size = cuts.randint(1, 4)
        item, rest = rest[:size], rest[size:]
        found.append(answer.delta(StepTokens(tuple(item), None if rest else finish)).delta)
    return answer, found


@pytest.mark.parametrize("seed", range(8))
def test_deltas_concatenate_to_the_text_and_never_end_inside_a_character(
    codec: TextCodec, manifest: Manifest, seed: int
) -> None:
    token_ids = codec.encode_prompt(TEXT)
    answer, found = deltas(codec, options(manifest), token_ids, LENGTH, random.Random(seed))
    assert "".join(delta.text for delta in found) == TEXT
    assert "�" not in "".join(delta.text for delta in found)
    assert tuple(i for delta in found for i in delta.token_ids) == token_ids
    assert (answer.num_tokens, answer.finish_reason) == (len(token_ids), FinishReason.LENGTH)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("stop", ["fox", " — ", "日本", "dog.", "T", "grüße, 日本語 👩‍👩‍👧"])
def test_a_stop_string_ends_the_answer_before_itself(
    codec: TextCodec, manifest: Manifest, stop: str, seed: int
) -> None:
    token_ids = codec.encode_prompt(TEXT)
    wanted = options(manifest, "nowhere", stop)
    answer, found = deltas(codec, wanted, token_ids, LENGTH, random.Random(seed))
    assert "".join(delta.text for delta in found) == TEXT[: TEXT.index(stop)]
    assert answer.finish_reason is FinishReason.STOP
    completing = next(i for i in range(len(token_ids) + 1) if stop in codec.decode(token_ids[:i]).rstrip("�"))
    assert answer.num_tokens == sum(len(delta.token_ids) for delta in found) == completing


def test_what_could_have_become_a_stop_string_is_delivered_at_the_end(codec: TextCodec, manifest: Manifest) -> None:
    token_ids = codec.encode_prompt(TEXT)
    answer, found = deltas(codec, options(manifest, "dog. Then"), token_ids, LENGTH, random.Random(1))
    assert "".join(delta.text for delta in found) == TEXT
    assert answer.finish_reason is FinishReason.LENGTH


def test_stop_strings_are_not_acted_on_before_min_tokens(codec: TextCodec, manifest: Manifest) -> None:
    token_ids = codec.encode_prompt("a b a b a b a b")
    for min_tokens in range(1, len(token_ids) + 1):
        wanted = options(manifest, "b", min_tokens=min_tokens)
        answer, found = deltas(codec, wanted, token_ids, LENGTH, random.Random(min_tokens))
        first = next(i for i in range(min_tokens, len(token_ids) + 1) if "b" in codec.decode(token_ids[i - 1 : i]))
        assert answer.num_tokens == first
        assert (
            "".join(delta.text for delta in found)
            == codec.decode(token_ids[: first - 1]) + codec.decode(token_ids[first - 1 : first]).partition("b")[0]
        )


def test_the_token_that_ends_the_answer_has_no_text(codec: TextCodec, manifest: Manifest) -> None:
    token_ids = codec.encode_prompt("one two")
    for finish in (EOS, Finish(reason=FinishReason.STOP, queue_seconds=0, prefill_seconds=0, decode_seconds=0)):
        answer, found = deltas(codec, options(manifest), token_ids, finish, random.Random(0))
        assert "".join(delta.text for delta in found) == codec.decode(token_ids[:-1])
        assert sum(len(delta.token_ids) for delta in found) == answer.num_tokens == len(token_ids)


def test_half_a_character_at_the_end_becomes_a_replacement_character(codec: TextCodec, manifest: Manifest) -> None:
    token_ids = codec.encode_prompt("日")[:1]
    _, found = deltas(codec, options(manifest), token_ids, LENGTH, random.Random(0))
    assert [delta.text for delta in found] == ["�"]


def test_logprobs_come_one_for_each_token_and_only_if_asked_for(codec: TextCodec, manifest: Manifest) -> None:
    token_ids = codec.encode_prompt("one two three")
    _, found = deltas(codec, options(manifest, logprobs=True), token_ids, LENGTH, random.Random(0))
    for delta in found:
        assert [logprob.token_id for logprob in delta.logprobs] == list(delta.token_ids)
        assert all(logprob.top[0].token_id == 7 for logprob in delta.logprobs)
    _, found = deltas(codec, options(manifest), token_ids, LENGTH, random.Random(0))
    assert not any(delta.logprobs for delta in found)
