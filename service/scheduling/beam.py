"""Beam search over the distributions of one step: which continuations live, which are finished, when all is decided.

Pure bookkeeping of one request; what runs where is the scheduler's business. W beams, V tokens of the vocabulary.
Source: Wu et al., Google's Neural Machine Translation System, 2016, arXiv:1609.08144 (the length penalty).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from service.scheduling.request import FinishReason, Hypothesis, Request, Token


@dataclass(frozen=True, slots=True)
class Continuation:
    """Beam `parent` goes on with `token_id`; the log-likelihood, in nats, is that of all its tokens."""

    parent: int
    token_id: int
    log_likelihood: float


class BeamSearch:
    """The search of one request, which must have a `beam`."""

    def __init__(self, request: Request) -> None:
        assert request.beam is not None, request.request_id
        self._request = request
        self._beam = request.beam
        self._finished: list[Hypothesis] = []

    @property
    def best(self) -> tuple[Hypothesis, ...]:
        """The answers found so far that the request wants, the best first."""
        ranked = sorted(self._finished, key=lambda found: -found.score)
        return tuple(ranked[: self._beam.num_answers])

    def advance(
        self, outputs: Sequence[Sequence[int]], log_likelihoods: Sequence[float], chosen: Sequence[Token]
    ) -> list[Continuation]:
        """Take one step and return the beams that go on, the best first; none when the search is over.

        Args:
            outputs: the tokens of each beam so far.
            log_likelihoods: of each beam.
            chosen: for each beam the next token's distribution: its `top` min(2 W, V) tokens.
        """
        width = self._beam.width
        num_tokens = len(outputs[0]) + 1
        candidates = [
            Continuation(parent, token_id, log_likelihoods[parent] + logprob)
            for parent, token in enumerate(chosen)
            for token_id, logprob in token.top
        ]
        # Each of W beams can end in one way or few, so 2 W candidates hold W that go on.
        candidates = sorted(candidates, key=lambda candidate: -candidate.log_likelihood)[: 2 * width]
        ends = self._request.end_token_ids
        for candidate in candidates[:width]:  # one further down would not have stayed in the beam either
            if candidate.token_id in ends:
                is_stop = candidate.token_id in self._request.stop_token_ids
                self._add(outputs, candidate, FinishReason.STOP if is_stop else FinishReason.EOS)
        alive = [candidate for candidate in candidates if candidate.token_id not in ends][:width]
        if not alive or self._is_decided(alive[0].log_likelihood):
            return []
        if num_tokens == self._request.max_tokens:
            for candidate in alive:
                self._add(outputs, candidate, FinishReason.LENGTH)
            return []
        return alive

    def _add(self, outputs: Sequence[Sequence[int]], last: Continuation, reason: FinishReason) -> None:
        token_ids = (*outputs[last.parent], last.token_id)
        score = self._beam.score(last.log_likelihood, len(token_ids))
        self._finished.append(
            Hypothesis(token_ids=token_ids, reason=reason, log_likelihood=last.log_likelihood, score=score)
        )

    def _is_decided(self, alive: float) -> bool:
        """Say whether no beam that is alive can still come among the W best: likelihoods only fall.

        Greedy decoding, a width of 1, ends with its first answer, whatever the length penalty could still prefer.
        """
        width = self._beam.width
        if len(self._finished) < width or width == 1:
            return len(self._finished) == width
        worst = sorted((found.score for found in self._finished), reverse=True)[width - 1]
        return self._beam.score(alive, self._request.max_tokens) <= worst
