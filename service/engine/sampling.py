"""Choosing the next token from a row of logits.

Every choice is a function of the row, the request and the position alone: one row at a time, one uniform number a
position, so neither neighbours nor load can change it. The vocabulary is never sorted: the tokens that can pass the
filters are found by a bound first, and only their probabilities are sorted.

Axes: vocabulary V.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.scheduling.plan import Sample
from service.scheduling.request import SamplingParams, Token

_MASK = (1 << 64) - 1
_BLOCK = 256


class NotFinite(ArithmeticError):
    """The logits hold NaN or infinity: nothing can be chosen."""


def check_finite(logits: NDArray[np.float32], best: int) -> None:
    """Look at the largest of a row of logits [V], which is where NaN and positive infinity show.

    Raises:
        NotFinite: the row holds either.
    """
    if not np.isfinite(logits[best]):
        raise NotFinite("the logits are not finite")


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


def uniforms(seeds: Sequence[int] | NDArray[np.uint64], positions: Sequence[int]) -> NDArray[np.float64]:
    """Return `uniform` of many seeds and positions, bit for bit."""
    state = np.array(seeds, np.uint64)  # unsigned arithmetic of numpy wraps around
    for words in (0, np.array(positions, np.uint64), 0):
        state += np.uint64(0x9E3779B97F4A7C15) * (np.asarray(words, np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Sampler:
    """Chooses tokens; owns scratch memory so that equal rows always take equal paths through numpy.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._scores = np.empty(vocab_size, np.float32)
        blocks = -(-vocab_size // _BLOCK)
        self._blocks = np.zeros((blocks, _BLOCK), np.float32)  # what is past the vocabulary stays zero
        self._powers = self._blocks.reshape(-1)[:vocab_size]

    def choose(self, logits: NDArray[np.float32], best: int, sample: Sample) -> Token:
        """Choose a token from one row of logits [V], which is left as it is.

        Args:
            logits: the row.
            best: index of its largest element, or of a NaN (as numpy's argmax has it).
            sample: what to choose for.

        Raises:
            NotFinite: the row holds NaN or positive infinity.
        """
        check_finite(logits, best)
        request = sample.request
        params = request.sampling
        suppresses = sample.num_output < request.min_tokens
        scores = logits
        if params.adjusts_logits or suppresses:
            scores = self._adjusted(logits, sample, suppresses=suppresses)
            best = int(scores.argmax())
        token_id = best if params.is_greedy else self._draw(scores, best, params, sample.position)
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
            seen = np.unique(np.array((*request.prompt, *sample.generated), np.int64))
            at = scores[seen]
            scores[seen] = np.where(
                at > 0, at / np.float32(params.repetition_penalty), at * np.float32(params.repetition_penalty)
            )
        if sample.num_output and (params.presence_penalty or params.frequency_penalty):
            seen, counts = np.unique(np.array(sample.generated, np.int64), return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            scores[seen] -= penalty.astype(np.float32)
        for token_id, bias in params.logit_bias:
            scores[token_id] += np.float32(bias)
        if suppresses:
            scores[list(request.eos_token_ids | request.stop_token_ids)] = -np.inf
        return scores

    def _draw(self, scores: NDArray[np.float32], best: int, params: SamplingParams, position: int) -> int:
        """Draw from the filtered distribution by its inverse cumulative sum.

        With filters the sum runs from the most likely token down; without any, in the order of the vocabulary.
        """
        powers = self._powers
        np.subtract(scores, scores[best], out=self._scores)
        np.multiply(self._scores, np.float32(1.0 / params.temperature), out=self._scores)
        np.exp(self._scores, out=powers)  # probabilities in units of the highest
        number = uniform(params.seed, position)
        top_k = params.top_k if params.top_k < powers.size else 0
        if not (top_k or params.top_p < 1.0 or params.min_p > 0.0):
            return self._draw_unfiltered(number)
        candidates = np.flatnonzero(powers >= self._lowest(top_k, params))
        ranked = np.sort(powers[candidates])[::-1]
        kept = ranked[:top_k] if top_k else ranked
        cumulative = np.cumsum(kept, dtype=np.float64)
        if params.top_p < 1.0:
            whole = cumulative[-1] if top_k else float(powers.sum())
            cumulative = cumulative[: int(np.searchsorted(cumulative, params.top_p * whole)) + 1]
        if params.min_p > 0.0:
            cumulative = cumulative[: int(np.count_nonzero(kept[: cumulative.size] >= np.float32(params.min_p)))]
        rank = _invert(cumulative, number)
        # Equally likely tokens rank in the order of the vocabulary.
        ties_before = rank - int(np.searchsorted(-ranked, -ranked[rank]))
        return int(candidates[np.flatnonzero(powers[candidates] == ranked[rank])[ties_before]])

    def _draw_unfiltered(self, number: float) -> int:
        """Invert the cumulative sum of the whole vocabulary: of its blocks first, then inside one."""
        cumulative = np.cumsum(self._blocks.sum(axis=1), dtype=np.float64)
        block = _invert(cumulative, number)
        before = cumulative[block - 1] if block else 0.0
        inside = before + np.cumsum(self._blocks[block], dtype=np.float64)
        index = int(np.searchsorted(inside, number * cumulative[-1], side="right"))
        # Rounding may leave the number behind the block's own sum: then its last token of any weight is meant.
        return block * _BLOCK + min(index, int(np.flatnonzero(self._blocks[block])[-1]))

    def _lowest(self, top_k: int, params: SamplingParams) -> float:
        """Return a power that every token that passes the filters has."""
        powers = self._powers
        if top_k:
            return float(np.partition(powers, powers.size - top_k)[powers.size - top_k])
        lowest = params.min_p
        if params.top_p < 1.0:
            # All tokens below this share of the whole have together less than 1 - top_p of it.
            lowest = max(lowest, (1.0 - params.top_p) * float(powers.sum()) / powers.size)
        return min(lowest, 1.0)

    def _with_logprobs(self, logits: NDArray[np.float32], token_id: int, num_top: int) -> Token:
        scores = self._scores
        highest = logits.max()
        np.subtract(logits, highest, out=scores)
        np.exp(scores, out=self._powers)
        log_total = float(np.log(self._powers.sum()))
        top: tuple[tuple[int, float], ...] = ()
        if num_top:
            kth = np.partition(scores, scores.size - num_top)[scores.size - num_top]
            likely = np.flatnonzero(scores >= kth)
            likely = likely[np.lexsort((likely, -scores[likely]))][:num_top]
            top = tuple((int(other), float(scores[other]) - log_total) for other in likely)
        return Token(token_id, float(scores[token_id]) - log_total, top)


def _invert(cumulative: NDArray[np.float64], number: float) -> int:
    """Return the first index whose cumulative sum exceeds `number` of the whole."""
    index = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    return min(index, cumulative.size - 1)
