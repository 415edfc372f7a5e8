"""What a served decoder answers is what PyTorch says, of all lengths together, alone and among others.

Logits of a device may be off by `golden.bound` of the largest one, those of the CPU by a ten-thousandth. So the best
token is prescribed where it leads by more than twice that, and everywhere a token must be one that could be the best.
"""

import math
from collections.abc import Sequence

import pytest

from attendant.v1 import generation_pb2 as pb

LENGTHS = (1, 2, 3, 17, 31, 32, 33, 64, 65, 100, 129, 200)
NEW_TOKENS = 24


def prompts(served) -> list[list[int]]:
    return [served.text[300 * number : 300 * number + length] for number, length in enumerate(LENGTHS)]


def check(served, prompt: Sequence[int], answer) -> int:
    """Compare an answer with the oracle, teacher-forced; return how many of its tokens are prescribed."""
    ids = [token.token_id for token in answer]
    logits, slack = served.logits([*prompt, *ids])
    logits, slack = logits[len(prompt) - 1 : -1], slack[len(prompt) - 1 : -1]
    logprobs = logits.log_softmax(1)
    prescribed = 0
    for row, token in enumerate(answer):
        best, second = logits[row].topk(2).values.tolist()
        off = float(slack[row])
        if best - second > 2 * off:
            prescribed += 1
            assert token.token_id == int(logits[row].argmax()), (len(prompt), row)
        assert float(logits[row, token.token_id]) >= best - 2 * off, (len(prompt), row)
        for token_id, logprob in ((token.token_id, token.logprob), *token.top):
            assert abs(logprob - float(logprobs[row, token_id])) <= 2 * off + 1e-5, (len(prompt), row, token_id)
    return prescribed


def test_greedy_answers_of_all_lengths_together_are_those_of_pytorch(served) -> None:
    given = prompts(served)
    calls = [served.ask(prompt, NEW_TOKENS) for prompt in given]
    prescribed = 0
    for prompt, call in zip(given, calls, strict=True):
        answer, usage = served.read(call)
        assert (len(answer), usage.output_tokens, usage.prompt_tokens) == (NEW_TOKENS, NEW_TOKENS, len(prompt))
        prescribed += check(served, prompt, answer)
    share = prescribed / (len(given) * NEW_TOKENS)
    assert share > (0.95 if served.is_exact else 0.15), "too few tokens are prescribed to say anything"


def same_until_a_tie(served, prompt: Sequence[int], one, other) -> None:
    """Two answers are equal, on a device up to where two tokens are too close to tell."""
    if served.is_exact:
        assert one == other, "tokens and the bits of log-probabilities"
        return
    for row, (token, twin) in enumerate(zip(one, other, strict=True)):
        logits, slack = served.logits([*prompt, *(each.token_id for each in one[:row])])
        off = float(slack[-1])
        if token.token_id != twin.token_id:
            assert abs(float(logits[-1, token.token_id] - logits[-1, twin.token_id])) <= 2 * off, row
            return
        assert abs(token.logprob - twin.logprob) <= 2 * off, row


def test_an_answer_is_the_same_alone_and_among_others(served) -> None:
    given = prompts(served)
    watched = given[5]
    alone, _ = served.read(served.ask(watched, NEW_TOKENS))
    for others in (1, 4, 11):
        calls = [served.ask(prompt, NEW_TOKENS - 3) for prompt in given[:others]]
        among, _ = served.read(served.ask(watched, NEW_TOKENS))
        same_until_a_tie(served, watched, among, alone)
        for call in calls:
            served.read(call)


@pytest.mark.parametrize(
    "filters", [{"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.15}, {"top_k": 20, "top_p": 0.8, "min_p": 0.02}], ids=str
)
def test_sampled_tokens_obey_their_filters(served, filters: dict[str, float]) -> None:
    """Judged with the oracle's logits, which leave a little more room than the filter itself."""
    prompt = served.text[5000:5040]
    calls = [served.ask(prompt, NEW_TOKENS, temperature=1, seed=seed, **filters) for seed in range(8)]
    found = set()
    for call in calls:
        answer, _ = served.read(call)
        ids = [token.token_id for token in answer]
        found.add(tuple(ids))
        logits, slack = served.logits([*prompt, *ids])
        for row, token_id in enumerate(ids, len(prompt) - 1):
            off = 2 * float(slack[row]) + 1e-6
            chosen, ranked = float(logits[row, token_id]), logits[row].sort(descending=True).values
            if top_k := filters.get("top_k"):
                assert chosen >= float(ranked[int(top_k) - 1]) - off
            if min_p := filters.get("min_p"):
                assert chosen >= float(ranked[0]) + math.log(min_p) - off
            if top_p := filters.get("top_p"):
                before = float(logits[row].softmax(0)[logits[row] > chosen + off].sum())
                assert before * math.exp(-2 * off) <= top_p
    assert len(found) > 4, "other seeds, other answers"


def test_penalties_biases_and_seeds_reach_the_choice(served) -> None:
    prompt = served.text[6000:6040]
    plain = [token.token_id for token in served.read(served.ask(prompt, NEW_TOKENS))[0]]
    banned = {token_id: -100.0 for token_id in set(plain)}
    without = [token.token_id for token in served.read(served.ask(prompt, NEW_TOKENS, logit_bias=banned))[0]]
    assert not set(without) & set(plain)
    penalised, _ = served.read(served.ask(prompt, 60, frequency_penalty=2, presence_penalty=2))
    assert len({token.token_id for token in penalised}) > len(
        {token.token_id for token in served.read(served.ask(prompt, 60))[0]}
    )
    # The second and third find the same beginning in the cache, so that they are the same computation.
    drawn = [served.read(served.ask(prompt, NEW_TOKENS, temperature=1.2, seed=5))[0] for _ in range(3)]
    assert [token.token_id for token in drawn[1]] == [token.token_id for token in drawn[2]]


def test_the_answers_of_a_beam_search_are_as_likely_as_pytorch_says(served) -> None:
    """Beams are copied from slot to slot at nearly every step: one copy that lost something would show."""
    import torch

    prompt = served.text[7000:7050]
    searched = served.server.generate(
        served.model,
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(max_tokens=NEW_TOKENS, n=4),
        beam=pb.BeamSearch(width=4),
        stop=pb.StopConditions(ignore_eos=True),
    )
    answers: dict[int, list[int]] = {}
    said: dict[int, float] = {}
    for event in searched:
        answers.setdefault(event.delta.index, []).extend(event.delta.token_ids)
        if event.HasField("finished"):
            said[event.finished.index] = event.finished.log_likelihood
    assert len(said) == 4 and [said[index] for index in sorted(said)] == sorted(said.values(), reverse=True)
    assert len({tuple(answer) for answer in answers.values()}) == 4
    for index, answer in answers.items():
        assert len(answer) == NEW_TOKENS
        logits, slack = served.logits([*prompt, *answer])
        chosen = logits.log_softmax(1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        # Roundings of different steps are as often up as down.
        off = 2 * float(slack[len(prompt) - 1 : -1].norm()) + 1e-4
        assert abs(said[index] - float(chosen.sum())) <= off
