"""The canary chooses few requests, one at a time, and judges what it is told."""

from dataclasses import replace

from service.scheduling.canary import PATIENCE_SECONDS, Canary, Verdict, is_replay
from service.scheduling.plan import FailureEvent, TokenEvent
from service.scheduling.request import Beam, Finish, FinishReason, Request, SamplingParams, Token

GREEDY = SamplingParams(temperature=0.0)
END = Finish(reason=FinishReason.LENGTH, queue_seconds=0.0, prefill_seconds=0.0, decode_seconds=0.0)


def make_request(name: str, **fields: object) -> Request:
    settings = {"prompt": (1, 2, 3), "max_tokens": 3, "sampling": GREEDY, "arrival": 0.0} | fields
    return Request(request_id=name, **settings)


def event(request: Request, token: Token, *, last: bool = False) -> TokenEvent:
    return TokenEvent(
        request=request,
        token=token,
        context_tokens=4,
        is_first=False,
        gap_seconds=0.1,
        queue_seconds=0.0,
        prefill_seconds=0.0,
        cached_tokens=0,
        finish=END if last else None,
    )


def answer(canary: Canary, request: Request, tokens: list[Token], now: float = 0.0) -> list[bool]:
    return [canary.hear(event(request, token, last=token is tokens[-1]), now) for token in tokens]


TOKENS = [Token(5, -0.25), Token(6, -0.5), Token(7, -0.75)]


def pending(verdicts: list[Verdict], **fields: object) -> Canary:
    """A canary with a finished request."""
    canary = Canary(1.0, verdicts.append)
    request = make_request("1/a", **fields)
    canary.admit(request)
    assert answer(canary, request, TOKENS) == [False] * 3
    return canary


def test_every_hundredth_request_is_chosen_and_never_two_at_once() -> None:
    verdicts: list[Verdict] = []
    canary, chosen = Canary(0.01, verdicts.append), 0
    for index in range(1000):
        request = make_request(str(index))
        canary.admit(request)
        answer(canary, request, TOKENS)
        if (replay := canary.next_replay(0.0)) is not None:
            chosen += 1
            assert canary.next_replay(0.0) is None
            answer(canary, replay, TOKENS)
    assert chosen == len(verdicts)
    assert 9 <= chosen <= 10
    assert {verdict.result for verdict in verdicts} == {"same"}


def test_at_a_rate_of_zero_and_for_what_promises_no_equal_tokens_nothing_is_chosen() -> None:
    verdicts: list[Verdict] = []
    for rate, fields in (
        (0.0, {}),
        (1.0, {"sampling": SamplingParams(temperature=0.7)}),
        (1.0, {"beam": Beam(width=2)}),
    ):
        canary = Canary(rate, verdicts.append)
        request = make_request("1/a", **fields)
        canary.admit(request)
        answer(canary, request, TOKENS)
        assert canary.next_replay(0.0) is None


def test_a_replay_asks_for_the_same_without_deadline_help_or_precedence() -> None:
    canary = pending([], deadline=9.0, priority=3, tenant="acme", max_tokens=50)
    replay = canary.next_replay(5.0)
    assert is_replay(replay.request_id)
    assert (replay.prompt, replay.sampling, replay.max_tokens) == ((1, 2, 3), GREEDY, 3)
    assert (replay.deadline, replay.tenant, replay.may_reuse) == (None, "", False)
    assert replay.priority < -1000


def test_tokens_and_the_bits_of_logprobs_are_compared() -> None:
    for replayed, result, position in (
        (TOKENS, "same", None),
        ([Token(5, -0.25), Token(8, -0.5), Token(7, -0.75)], "different", 1),
        ([Token(5, -0.25), Token(6, -0.5000001), Token(7, -0.75)], "different", 1),
        (TOKENS[:2], "different", 2),
    ):
        verdicts: list[Verdict] = []
        canary = pending(verdicts)
        replay = canary.next_replay(1.0)
        assert answer(canary, replay, replayed) == [True] * len(replayed)
        assert verdicts == [Verdict("1/a", result, position)]
        assert canary.next_replay(1.0) is None


def test_a_replay_that_fails_where_the_request_did_not_is_different() -> None:
    verdicts: list[Verdict] = []
    canary = pending(verdicts)
    assert canary.hear(FailureEvent(canary.next_replay(1.0), "the graph failed"), 1.0)
    assert verdicts == [Verdict("1/a", "different", 0)]


def test_an_interrupted_replay_begins_anew_and_what_still_comes_of_it_is_nobodys() -> None:
    verdicts: list[Verdict] = []
    canary = pending(verdicts)
    first = canary.next_replay(1.0)
    assert canary.hear(event(first, TOKENS[0]), 1.0)
    assert canary.interrupt() == first.request_id
    assert canary.interrupt() is None
    assert canary.hear(event(first, TOKENS[1]), 1.0)
    second = canary.next_replay(2.0)
    assert second == replace(first, request_id=second.request_id, arrival=2.0)
    assert second.request_id != first.request_id
    answer(canary, second, TOKENS)
    assert [verdict.result for verdict in verdicts] == ["same"]


def test_a_request_that_finds_no_idle_engine_is_skipped_and_another_chosen() -> None:
    verdicts: list[Verdict] = []
    canary = pending(verdicts)
    canary.expire(PATIENCE_SECONDS)
    assert verdicts == []
    assert canary.next_replay(PATIENCE_SECONDS + 1) is None
    assert verdicts == [Verdict("1/a", "skipped")]
    request = make_request("2/b")
    canary.admit(request)
    answer(canary, request, TOKENS)
    assert canary.next_replay(0.0) is not None


def test_a_request_that_is_given_up_or_fails_leaves_its_place_to_the_next() -> None:
    canary = Canary(0.5, lambda verdict: None)
    for name in ("1/a", "2/b"):
        canary.admit(make_request(name))
    canary.lose("2/b")
    canary.admit(make_request("3/c"))
    assert not canary.hear(FailureEvent(make_request("3/c"), "the graph failed"), 0.0)
    request = make_request("4/d")
    canary.admit(request)
    answer(canary, request, TOKENS)
    assert canary.next_replay(0.0) is not None
