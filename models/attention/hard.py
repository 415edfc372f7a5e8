"""Hard attention: read one place instead of the mean of all, and learn where to look nevertheless.

Choosing has no gradient. It is estimated, without bias, from the probability of what was chosen (REINFORCE), or
replaced by that of a soft choice (straight-through). Everything here starts from weights or scores, of which a
`Normalizer` makes the former; a distribution in which nothing is allowed is all zero, and stays so.

Shapes: weights are (..., S), probabilities over S places. Source: Xu et al., Show, Attend and Tell, 2015,
arXiv:1502.03044; Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, 2016, arXiv:1611.01144.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention.functional import entropy
from models.attention.normalizers import hardmax, masked_softmax


class Choice(NamedTuple):
    """One place for each distribution.

    index: (...) int64; 0 where nothing was allowed.
    weights: (..., S), 1 at the place and 0 elsewhere, without gradient; all 0 where nothing was allowed.
    log_prob: (...), nats; its gradient is what REINFORCE needs. 0 where nothing was allowed.
    entropy: (...), nats, of the distribution that was chosen from, differentiable.
    """

    index: Tensor
    weights: Tensor
    log_prob: Tensor
    entropy: Tensor


def sample(weights: Tensor, *, uniform: Tensor | None = None, generator: torch.Generator | None = None) -> Choice:
    """Draw a place with the probability of its weight.

    Args:
        weights: (..., S).
        uniform: (...), the noise, from [0, 1), for a choice that can be repeated anywhere; drawn when None.
        generator: where the noise is drawn from; torch's global one when None.

    Raises:
        ValueError: there is no place to choose, or the noise has another shape.
    """
    _check_places(weights)
    if uniform is None:
        uniform = torch.rand(weights.shape[:-1], generator=generator, dtype=torch.float64, device=weights.device)
    elif uniform.shape != weights.shape[:-1]:
        raise ValueError(f"uniform has shape {tuple(uniform.shape)}; the weights need {tuple(weights.shape[:-1])}")
    cumulative = weights.detach().double().cumsum(-1)
    total = cumulative[..., -1:]
    index = (cumulative <= uniform.double()[..., None] * total).sum(-1, keepdim=True)
    return _choice(weights, index.masked_fill(total == 0, 0))


def most_likely(weights: Tensor) -> Choice:
    """Choose the place of the largest weight, the first of equals: hard attention at inference.

    Raises:
        ValueError: there is no place to choose.
    """
    _check_places(weights)
    return _choice(weights, weights.detach().argmax(-1, keepdim=True))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Return the chosen values (B, ...) of values (B, S, ...), by index (B,): nothing is read of any other place."""
    return values[torch.arange(values.shape[0], device=values.device), index]


def gumbel_straight_through(
    scores: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a sample of softmax(scores) as one-hot weights (..., S), with the gradient of its soft relaxation.

    With its options bound (functools.partial) this is a `Normalizer`. The gradient is biased, the less the lower the
    temperature, but varies little.

    Args:
        scores: (..., S).
        mask: boolean, True = attend, broadcastable to the scores.
        temperature: of the relaxation.
        uniform: (..., S), the noise, from [0, 1); drawn when None.
        generator: where the noise is drawn from; torch's global one when None.

    Raises:
        ValueError: the temperature is not above 0, or the noise has another shape.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if uniform is None:
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64, device=scores.device)
    elif uniform.shape != scores.shape:
        raise ValueError(f"uniform has shape {tuple(uniform.shape)}; the scores need {tuple(scores.shape)}")
    noise = -torch.log(-torch.log(uniform.double().clamp(min=torch.finfo(torch.float64).tiny)))
    perturbed = scores + noise.to(torch.promote_types(scores.dtype, torch.float32))
    soft = masked_softmax(perturbed / temperature, mask)
    # The difference is exactly 0, so the weights are exactly one-hot; its gradient is that of `soft`.
    return (hardmax(perturbed, mask) + (soft - soft.detach())).to(scores.dtype)


class MovingBaseline(nn.Module):
    """What reward is to be expected: an exponential moving average of the rewards of earlier batches.

    It stays as it is in evaluation mode, and is part of the `state_dict`, so that an interrupted run continues alike.

    Args:
        decay: the share that the old average keeps; Xu et al. take 0.9.

    Raises:
        ValueError: decay is not in [0, 1).
    """

    def __init__(self, decay: float = 0.9):
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))

    def forward(self, reward: Tensor) -> Tensor:
        """Return the average () before these rewards (B,): it may not depend on what it is held against."""
        value = self.value.clone()
        if self.training:
            self.value.lerp_(reward.detach().float().mean(), 1.0 - self.decay)
        return value


def reinforce_loss(
    log_likelihood: Tensor,
    log_prob: Tensor,
    entropy: Tensor,
    *,
    baseline: Tensor | float = 0.0,
    reward_weight: float = 1.0,
    entropy_weight: float = 0.0,
) -> Tensor:
    """Return a loss whose gradient estimates that of the expected negative log-likelihood over all choices.

    With a reward weight of 1 and no entropy term the estimate is unbiased, whatever the baseline, as long as that does
    not depend on the choices of this batch.

    Args:
        log_likelihood: (B,), nats, of the labels given what was chosen; it is also the reward.
        log_prob: (B,), nats, of what was chosen, summed over the choices of an example.
        entropy: (B,), nats, of the distributions chosen from, summed likewise.
        baseline: a scalar or (B,), subtracted from the reward.
        reward_weight: how much the gradient through the choice counts.
        entropy_weight: how much indecision is rewarded, in training's beginning above all.

    Returns:
        A scalar.
    """
    advantage = (log_likelihood - baseline).detach()
    gain = log_likelihood + reward_weight * advantage * log_prob + entropy_weight * entropy
    return -gain.mean()


def _choice(weights: Tensor, index: Tensor) -> Choice:
    """Describe the places index (..., 1)."""
    chosen = weights.gather(-1, index)
    nothing = chosen == 0
    one_hot = torch.zeros_like(weights).scatter(-1, index, (~nothing).to(weights.dtype))
    log_prob = chosen.masked_fill(nothing, 1.0).log()
    return Choice(index.squeeze(-1), one_hot.detach(), log_prob.squeeze(-1), entropy(weights))


def _check_places(weights: Tensor) -> None:
    if weights.shape[-1] == 0:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; there is no place to choose")
