"""Which short prompts are read together: a run costs something whatever it does, padding costs what tokens cost.

Only whole prompts without a past can share a run, because the kernels take one length of all rows, and only those of
neighbouring slots, because a run writes one range of the pools.
"""

from collections.abc import Sequence

from service.scheduling.plan import Chunk
from service.scheduling.slots import rounded
from service.scheduling.work import Predict, prefill_work, prompts_work

PADDING = 0.25
"""Most padding of a group, as a share of its tokens: what lies behind a prompt's end is computed for nobody."""


def best_group(prompts: Sequence[Chunk], predict: Predict) -> tuple[Chunk, ...]:
    """Return the prompts of neighbouring slots that gain most from one run, in the order of their slots, or none.

    Args:
        prompts: whole ones, each in a slot of its own.
        predict: foresees the seconds of a run, or None while that is not known.
    """
    ordered = sorted(prompts, key=lambda prompt: prompt.slot)
    best, most = (0, 0), 0.0
    for first in range(len(ordered)):
        lengths: list[int] = []
        rooms: list[int] = []
        apart = 0.0
        for last in range(first, len(ordered)):
            if ordered[last].slot - ordered[first].slot != last - first:
                break
            length = len(ordered[last].token_ids)
            seconds = predict("prefill", prefill_work(0, length))
            if seconds is None:
                return ()
            apart += seconds
            lengths.append(length)
            rooms.append(_room(ordered[last]))
            if max(lengths) > min(rooms) or sum(lengths) < (1 - PADDING) * len(lengths) * max(lengths):
                continue
            together = predict("prefill", prompts_work(lengths))
            if together is not None and apart - together > most:
                best, most = (first, last + 1), apart - together
    return tuple(ordered[slice(*best)])


def _room(prompt: Chunk) -> int:
    """Return how many positions of its slot are its own: no padding is written behind them."""
    assert prompt.sample is not None, "a prompt's last token has a successor"
    return rounded(prompt.sample.request.max_total_tokens)
