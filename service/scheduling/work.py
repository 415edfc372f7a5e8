"""What a run of a graph has to do, counted as the latency model counts it: runs, tokens, tokens times context."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from service.scheduling.plan import Encode, Row, StepPlan

Phase = Literal["encode", "prefill", "decode"]
"""What a graph is run for."""


class Work(NamedTuple):
    """Amounts that add up when graphs run one after the other.

    Args:
        runs: of a graph.
        tokens: that went through it, padding and parked rows included.
        attended: positions that attention read, over all tokens; quadratic in the length of what is read at once.
    """

    runs: float
    tokens: float
    attended: float


Predict = Callable[[Phase, Work], float | None]
"""Foresees the seconds of a run; None while too little is known. More work never takes less."""


def encode_work(rows: int, length: int) -> Work:
    """Return the work of reading so many rows at once, all padded to one length; an image without tokens has 1."""
    return Work(1, rows * length, rows * length * length)


def prefill_work(start: int, num_tokens: int) -> Work:
    """Return the work of one chunk: its tokens read what lies before it, and on average half of the chunk itself."""
    return Work(1, num_tokens, num_tokens * (start + num_tokens / 2))


def prompts_work(lengths: Sequence[int]) -> Work:
    """Return the work of reading whole prompts at once, all padded to the longest."""
    rows, longest = len(lengths), max(lengths)
    return Work(1, rows * longest, rows * longest * longest / 2)


def decode_work(contexts: Sequence[int]) -> Work:
    """Return the work of one token for each row, given how many tokens each then has; parked rows run too."""
    return Work(1, len(contexts), sum(contexts))


def plan_work(plan: StepPlan) -> dict[Phase, Work]:
    """Return the work of each phase that a step has."""
    work: dict[Phase, Work] = {}
    if plan.encodes:
        work["encode"] = _of_encodes(plan.encodes)
    if plan.reads:
        work["prefill"] = _of_reads(plan)
    if plan.rows:
        work["decode"] = _of_rows(plan.rows)
    return work


def _of_encodes(encodes: Sequence[Encode]) -> Work:
    return encode_work(len(encodes), max(1, *(len(encode.source.token_ids) for encode in encodes)))


def _of_reads(plan: StepPlan) -> Work:
    works = [prefill_work(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks]
    if plan.prompts:
        works.append(prompts_work([len(prompt.token_ids) for prompt in plan.prompts]))
    return Work(*(sum(amounts) for amounts in zip(*works, strict=True)))


def _of_rows(rows: Sequence[Row]) -> Work:
    return decode_work([row.length for row in rows])
