"""Greedy generation without a cache: slow, obvious, and what every faster path is compared with.

Shapes: T tokens so far, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch

from models.decoder import Decoder


@torch.inference_mode()
def greedy(
    decoder: Decoder, prompt_ids: Sequence[int], max_tokens: int, eos_token_ids: Collection[int] = ()
) -> list[int]:
    """Return the tokens that follow `prompt_ids`, each the most likely one, the whole text run again for each.

    Generation ends after `max_tokens` tokens, or with the first of `eos_token_ids`, which is returned as the last.

    Raises:
        ValueError: the prompt is empty, or prompt and output together exceed max_model_len.
    """
    limit = decoder.config.max_model_len
    if not prompt_ids:
        raise ValueError("prompt_ids is empty; it must hold at least 1 token")
    if len(prompt_ids) + max_tokens > limit:
        raise ValueError(f"{len(prompt_ids)} prompt tokens and {max_tokens} more exceed max_model_len, {limit}")
    token_ids = list(prompt_ids)
    while len(token_ids) < len(prompt_ids) + max_tokens:
        logits = decoder(torch.tensor([token_ids], device=decoder.lm_head.weight.device))  # (1, T, V)
        token_ids.append(int(logits[0, -1].argmax()))
        if token_ids[-1] in eos_token_ids:
            break
    return token_ids[len(prompt_ids) :]
