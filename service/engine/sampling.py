"""Choosing the next token from a row of logits.

Every choice is a function of the row, the request and the position alone: one row at a time, one uniform number a
position, so neither neighbours nor load can change it. The vocabulary is never sorted: the tokens that can be in the
nucleus are found by thresholds first, and only they are.

Axes: vocabulary V.
"""

import numpy as np
from numpy.typing import NDArray

from service.scheduling.plan import Sample
from service.scheduling.request import SamplingParams, Token

_MASK = (1 << 64) - 1
# exp(-4), exp(-8), ... below the most likely token: nearly every nucleus lies above the first or second.
_THRESHOLDS = (4.0, 8.0, 12.0, 16.0)


class NotFinite(ArithmeticError):
    """The logits hold NaN or infinity: nothing can be chosen."""


def uniform(seed: int, position: int, candidate: int = 0) -> float:
    """Return a number in [0, 1) that depends on nothing but its arguments.

    Three rounds of the SplitMix64 finaliser (Steele, Lea, Flood 2014) mix seed, candidate and position.
    """
    state = seed & _MASK
    for word in (candidate, position, 0):
        state = (state + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


class Sampler:
    """Chooses tokens; owns scratch memory so that equal rows always take equal paths through numpy.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._scores = np.empty(vocab_size, np.float32)
        self._powers = np.empty(vocab_size, np.float32)

    def choose(self, logits: NDArray[np.float32], sample: Sample) -> Token:
        """Choose a token from one row of logits [V], which is left as it is.

        Raises:
            NotFinite: the row holds NaN or positive infinity.
        """
        best = int(logits.argmax())  # numpy puts NaN first
        if not np.isfinite(logits[best]):
            raise NotFinite(f"logits at position {sample.position} are not finite")
        request = sample.request
        params = request.sampling
        suppresses = sample.num_output < request.min_tokens
        if params.adjusts_logits or suppresses:
            scores = self._adjusted(logits, sample, suppresses=suppresses)
            best = int(scores.argmax())
        else:
            scores = logits
        token_id = best if params.is_greedy else self._draw(scores, params, float(scores[best]), sample.position)
        if not request.logprobs:
            return Token(token_id)
        return self._with_logprobs(logits, token_id, request.top_logprobs)

    def _adjusted(self, logits: NDArray[np.float32], sample: Sample, *, suppresses: bool) -> NDArray[np.float32]:
        """Apply penalties, bias and the minimum length, in scratch memory."""
        request = sample.request
        params = request.sampling
        scores = self._scores
        np.copyto(scores, logits)
        if params.repetition_penalty != 1.0:
            seen = np.unique(np.array(request.prompt + sample.output, np.int64))
            at = scores[seen]
            scores[seen] = np.where(
                at > 0, at / np.float32(params.repetition_penalty), at * np.float32(params.repetition_penalty)
            )
        if sample.output and (params.presence_penalty or params.frequency_penalty):
            seen, counts = np.unique(np.array(sample.output, np.int64), return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            scores[seen] -= penalty.astype(np.float32)
        for token_id, bias in params.logit_bias:
            scores[token_id] += np.float32(bias)
        if suppresses:
            scores[list(request.eos_token_ids | request.stop_token_ids)] = -np.inf
        return scores

    def _draw(self, scores: NDArray[np.float32], params: SamplingParams, highest: float, position: int) -> int:
        """Draw from the filtered distribution by its inverse cumulative sum.

        Filters need the most likely token first; without any the order of the vocabulary serves, unsorted.
        """
        scaled = self._scores
        np.subtract(scores, np.float32(highest), out=scaled)
        np.divide(scaled, np.float32(params.temperature), out=scaled)  # the most likely token is at 0
        top_k = params.top_k if params.top_k < scaled.size else 0
        candidates, total = self._candidates(scaled, top_k, params)
        if top_k or params.top_p < 1.0 or params.min_p > 0.0:
            candidates = candidates[np.lexsort((candidates, -scaled[candidates]))]
        if top_k:
            candidates = candidates[:top_k]
        powers = np.exp(scaled[candidates].astype(np.float64))
        cumulative = np.cumsum(powers)
        if params.top_p < 1.0:
            whole = cumulative[-1] if top_k else total
            keep = int(np.searchsorted(cumulative, params.top_p * whole)) + 1
            cumulative = cumulative[:keep]
        if params.min_p > 0.0:
            keep = int(np.searchsorted(-powers[: len(cumulative)], -params.min_p, side="right"))
            cumulative = cumulative[: max(keep, 1)]
        chosen = np.searchsorted(cumulative, uniform(params.seed, position) * cumulative[-1], side="right")
        return int(candidates[min(int(chosen), len(cumulative) - 1)])

    def _candidates(
        self, scaled: NDArray[np.float32], top_k: int, params: SamplingParams
    ) -> tuple[NDArray[np.int64], float]:
        """Return a superset of the tokens that pass the filters and, for top_p, the mass of the whole distribution."""
        if top_k:
            kth = np.partition(scaled, scaled.size - top_k)[scaled.size - top_k]
            return np.flatnonzero(scaled >= kth), 0.0
        total = 0.0
        if params.top_p < 1.0:
            np.exp(scaled, out=self._powers)
            total = float(self._powers.sum(dtype=np.float64))
            for threshold in _THRESHOLDS:
                candidates = np.flatnonzero(scaled >= -threshold)
                if float(self._powers[candidates].sum(dtype=np.float64)) >= params.top_p * total:
                    return candidates, total
        elif params.min_p > 0.0:
            return np.flatnonzero(scaled >= np.float32(np.log(params.min_p)) - np.float32(1e-3)), total
        return np.flatnonzero(scaled > -np.inf), total

    def _with_logprobs(self, logits: NDArray[np.float32], token_id: int, num_top: int) -> Token:
        scores = self._scores
        highest = logits.max()
        np.subtract(logits, highest, out=scores)
        np.exp(scores, out=self._powers)
        log_total = float(np.log(self._powers.sum(dtype=np.float64)))
        top: tuple[tuple[int, float], ...] = ()
        if num_top:
            kth = np.partition(scores, scores.size - num_top)[scores.size - num_top]
            likely = np.flatnonzero(scores >= kth)
            likely = likely[np.lexsort((likely, -scores[likely]))][:num_top]
            top = tuple((int(other), float(scores[other]) - log_total) for other in likely)
        return Token(token_id, float(scores[token_id]) - log_total, top)
