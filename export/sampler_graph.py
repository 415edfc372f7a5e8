"""Graphs that choose tokens where the logits are: the rules of the service's host sampler, on the device.

Everything has a shape known beforehand, no operator looks at another row, and none reads what lies in the host's
memory, so that a GPU can record a run and repeat it. They sort no vocabulary: of the V tokens of a row only the K most
likely are ranked, which lie in the K blocks of tokens with the highest maxima; where a draw falls behind these, the
host has to choose. A GPU adds up wide rows in parallel, but ONNX Runtime's CumSum goes one element after the other
there: hence blocks again, and no cumulative sum of a whole row.

B rows, V vocabulary, N blocks, K candidates, A adjustments.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attendant.bundle import NOT_FINITE, NOT_RANKED

CANDIDATES = 1024
"""K, the most candidates that are ranked: four of each thread that ONNX Runtime's TopK has on CUDA."""
TOP_LOGPROBS = 64
"""The most likely tokens that are told: a beam search of width 32 asks for twice its width."""
_BLOCK = 256
_EPSILON = 2.0**-52  # times a number, as much as makes it smaller; a factor near 1 the exporter would leave out


class SamplerGraph(nn.Module):
    """Logits, what each row's request wants and one uniform number of each row in; a token of each row out.

    Args:
        vocab_size: V.
        num_candidates: K.
    """

    def __init__(self, vocab_size: int, num_candidates: int = CANDIDATES) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.num_candidates = min(num_candidates, vocab_size)

    def forward(
        self,
        logits: Tensor,
        inverse_temperature: Tensor,
        uniform: Tensor,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        adjusted_ids: Tensor,
        repetition: Tensor,
        penalty: Tensor,
        bias: Tensor,
    ) -> Tensor:
        """Choose a token of each row.

        Args:
            logits: float32 [B, V].
            inverse_temperature: float32 [B], 0 where the most likely token is wanted.
            uniform: float64 [B], in [0, 1).
            top_k: int64 [B], 0 keeps all; None, as the next two, where no row has filters.
            top_p: float64 [B], at least 1 keeps all.
            min_p: float32 [B], 0 keeps all.
            adjusted_ids: int64 [B, A], the tokens whose logits change; those that repeat repeat all of their numbers.
            repetition: float32 [B, A], divides positive logits and multiplies others.
            penalty: float32 [B, A], subtracted then.
            bias: float32 [B, A], added last.

        Returns:
            int64 [B]: the token, or `NOT_FINITE`, or `NOT_RANKED`.
        """
        scores = _adjusted(logits, adjusted_ids, repetition, penalty, bias)
        best, best_id = _first_best(scores)
        greedy = inverse_temperature == 0
        scale = torch.where(greedy, 1.0, inverse_temperature)
        weights = torch.exp((scores - best) * scale[:, None])  # probabilities in units of the highest
        sums = _blocks(weights, _BLOCK, 0.0).sum(-1).double().cumsum(-1)
        chosen = _draw(weights, sums, uniform)
        if top_k is not None and top_p is not None and min_p is not None:
            ranked = self._draw_filtered(weights, sums[:, -1], uniform, _Filters(top_k, top_p, min_p))
            has_filters = (top_k > 0) & (top_k < self.vocab_size) | (top_p < 1) | (min_p > 0)
            chosen = torch.where(has_filters, ranked, chosen)
        chosen = torch.where(greedy, best_id, chosen)
        # A row with NaN or positive infinity, or of nothing but negative infinity, has a sum that is not a number.
        return torch.where(sums[:, -1] > 0, chosen, NOT_FINITE)

    def _draw_filtered(self, weights: Tensor, whole: Tensor, uniform: Tensor, filters: "_Filters") -> Tensor:
        """Draw from what passes, the most likely first, by the inverse of its cumulative sum.

        More may pass than is ranked. Then its weight is known within bounds, which mostly is enough to say which of the
        ranked tokens is meant.
        """
        candidates, ids = _largest(weights, self.num_candidates)
        cumulative = candidates.double().cumsum(-1)
        low, high = _kept_weight(filters, candidates, cumulative, whole, self.vocab_size)
        rank = _count(cumulative <= (uniform * low)[:, None])
        known = (rank == _count(cumulative <= (uniform * high)[:, None])) & (rank < self.num_candidates)
        return torch.where(known, _at(ids, rank.clamp(max=self.num_candidates - 1)), NOT_RANKED)


class LogprobsGraph(nn.Module):
    """Logits and what was chosen of them in; log-probabilities of that and of the most likely tokens out."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.num_top = min(TOP_LOGPROBS, vocab_size)

    def forward(self, logits: Tensor, choices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return natural log-probabilities.

        Args:
            logits: float32 [B, V].
            choices: int64 [B]; of a row without a choice the result means nothing.

        Returns:
            float32 [B] of the choices; the N most likely tokens, int64 [B, N], and float32 [B, N] of them.
        """
        top, ids = _largest(logits, self.num_top)
        highest = top[:, :1]
        sums = _blocks(torch.exp(logits - highest), _BLOCK, 0.0).sum(-1).double().sum(-1)
        log_total = torch.log(sums).float()
        chosen = _at(logits, choices.clamp(min=0)) - highest[:, 0] - log_total
        return chosen, ids, top - highest - log_total[:, None]


class _Filters(NamedTuple):
    """What each row's request keeps: [B], as `SamplerGraph.forward` takes them."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def _kept_weight(
    filters: _Filters, candidates: Tensor, cumulative: Tensor, whole: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Return what all that passes weighs at least and at most, [B]: the same where it ends among the candidates.

    Each filter keeps so many of the most likely tokens, hence all together keep the fewest of these. The share of
    `top_p` is one of what `top_k` leaves, or else of the sum of the whole row [B].
    """
    top_k, top_p, min_p = filters
    size = candidates.shape[1]
    all_ranked = size == vocab_size
    last, least = cumulative[:, -1], candidates[:, -1].double()

    has_top_k = (top_k > 0) & (top_k < vocab_size)
    low = torch.where(has_top_k, _at(cumulative, top_k.clamp(1, size) - 1), math.inf)
    most = torch.minimum(whole, last + (top_k - size).double() * least)
    high = torch.where(has_top_k & (top_k > size), most, low)

    # The token with which the sum reaches the share is the last; behind the candidates each weighs `least` at most.
    shares = [top_p * torch.where(has_top_k, bound, whole) for bound in (low, high)]
    places = [_count(cumulative < share[:, None]) for share in shares]
    reached = [_at(cumulative, place.clamp(max=size - 1)) for place in places]
    if not all_ranked:
        behind = (shares[0], shares[1] + least)
        reached = [torch.where(at < size, inside, out) for at, inside, out in zip(places, reached, behind, strict=True)]
    low, high = (
        torch.where(top_p < 1, torch.minimum(bound, sum_), bound)
        for bound, sum_ in zip((low, high), reached, strict=True)
    )

    likely = _count(candidates >= min_p[:, None])
    sum_likely = _at(cumulative, likely.clamp(min=1) - 1)
    most_likely = sum_likely if all_ranked else torch.where(likely < size, sum_likely, whole)
    low = torch.where(min_p > 0, torch.minimum(low, sum_likely), low)
    return low, torch.where(min_p > 0, torch.minimum(high, most_likely), high)


def _adjusted(logits: Tensor, ids: Tensor, repetition: Tensor, penalty: Tensor, bias: Tensor) -> Tensor:
    """Apply penalties, bias and what is forbidden."""
    at = logits.gather(1, ids)
    at = torch.where(at > 0, at / repetition, at * repetition) - penalty + bias
    return logits.scatter(1, ids, at)


def _first_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the highest score of each row [B, 1], and of the tokens that have it the lowest id [B]."""
    maxima = _blocks(scores, _BLOCK, -math.inf).amax(-1)
    best = maxima.amax(-1, keepdim=True)
    inside, ids = _members(scores, _first(maxima == best)[:, None], _BLOCK, -math.inf)
    return best, _at(ids, _first(inside == best)).clamp(max=scores.shape[1] - 1)


def _draw(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative sum of whole rows: of that of their blocks [B, N] first, then inside one."""
    target = uniform * sums[:, -1]
    block = _count(sums <= target[:, None])
    before = torch.where(block > 0, _at(sums, (block - 1).clamp(min=0)), 0.0)
    inside, ids = _members(weights, block[:, None], _BLOCK, 0.0)
    cumulative = inside.double().cumsum(-1)
    # Rounding may leave the number behind the block's own sum: then its last token of any weight is meant.
    last = cumulative[:, -1]
    rest = torch.minimum(target - before, last - last * _EPSILON)
    return _at(ids, _count(cumulative <= rest[:, None]))


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest of each row [B, count] and their ids, the lower id first of equals.

    They lie in the `count` blocks with the highest maxima, which are searched in the order of the vocabulary.
    """
    width = values.shape[1]
    if width <= 4 * count:
        return values.topk(count)
    size = 1 << round(math.log2(width / count) / 2)  # searches about as many maxima as members
    blocks = _blocks(values, size, -math.inf).amax(-1).topk(count).indices
    ascending = blocks.float().topk(count, largest=False).values.long()
    inside, ids = _members(values, ascending, size, -math.inf)
    top, at = inside.topk(count)
    return top, ids.gather(1, at)


def _blocks(values: Tensor, size: int, fill: float) -> Tensor:
    """Cut rows [B, V] into blocks [B, N, size], of which the last is filled up."""
    missing = -values.shape[1] % size
    padded = nn.functional.pad(values, (0, missing), value=fill) if missing else values
    return padded.reshape(-1, padded.shape[1] // size, size)


def _members(values: Tensor, blocks: Tensor, size: int, fill: float) -> tuple[Tensor, Tensor]:
    """Return what lies in some blocks of each row [B, M] of [B, V], and where: both [B, M * size]."""
    ids = (blocks[:, :, None] * size + torch.arange(size)).reshape(-1, blocks.shape[1] * size)
    last = values.shape[1] - 1
    if values.shape[1] % size == 0:
        return values.gather(1, ids), ids
    return torch.where(ids <= last, values.gather(1, ids.clamp(max=last)), fill), ids


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return one value of each row [B, M], at its index [B]."""
    return values.gather(1, index[:, None])[:, 0]


def _count(mask: Tensor) -> Tensor:
    """Return how many of each row are true, int64 [B]; in float32, which counts exactly up to 2^24."""
    return mask.float().sum(-1).long()


def _first(mask: Tensor) -> Tensor:
    """Return the first that is true of each row, or the last place if none is; int64 [B]."""
    places = torch.arange(mask.shape[1], dtype=torch.float32)
    return torch.where(mask, places, float(mask.shape[1] - 1)).amin(-1).long()
