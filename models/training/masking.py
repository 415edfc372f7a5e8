"""What a masked language model has to guess: which tokens are selected, and what is shown in their place.

Shapes: B rows, T tokens.
Source: Devlin et al., BERT, 2018, arXiv:1810.04805.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SELECTED = 0.15
MASKED, RANDOM = 0.8, 0.1
"""Shares of the selected tokens that become the mask token, and any other token; the rest stay as they are."""


class Masked(NamedTuple):
    """What the model sees, (B, T) int64, and where it is asked, (B, T) booleans."""

    inputs: Tensor
    selected: Tensor


def select(token_ids: Tensor, ordinary_ids: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Select each of token_ids (B, T) with a probability of 15 %, if it is one of `ordinary_ids` (N,)."""
    return torch.isin(token_ids, ordinary_ids) & (torch.rand(token_ids.shape, generator=generator) < SELECTED)


def mask_tokens(token_ids: Tensor, mask_token_id: int, ordinary_ids: Tensor) -> Masked:
    """Select tokens with torch's global generator and hide them.

    Args:
        token_ids: (B, T) int64.
        mask_token_id: what 80 % of the selected tokens become.
        ordinary_ids: (N,), the tokens that may be selected, and of which 10 % become one at random; neither padding nor
            others with a meaning of their own.
    """
    selected = select(token_ids, ordinary_ids)
    fate = torch.rand(token_ids.shape)
    random = ordinary_ids[torch.randint(len(ordinary_ids), token_ids.shape)]
    inputs = token_ids.masked_fill(selected & (fate < MASKED), mask_token_id)
    return Masked(torch.where(selected & (fate >= 1 - RANDOM), random, inputs), selected)
