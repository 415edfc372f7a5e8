"""Executes step plans: moves, decode rows, one chunk, then the choice of tokens.

It knows slots, tokens and logits; it knows neither clients nor text. A row on which the graph or the choice fails
gets a failure of its own: when a step raises, its rows are run again one by one. That is safe because a row writes only
at its own next positions, and exact because a row alone gives the bits it gives among others.
"""

import logging
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.engine.sampling import NotFinite, Sampler
from service.engine.step_graph import StepGraph
from service.scheduling.plan import Chunk, Row, Sample, StepPlan, StepResult
from service.scheduling.request import Token

logger = logging.getLogger(__name__)

_Logits = NDArray[np.float32]


class Engine:
    """Runs one bundle's plans on its step graph.

    Args:
        graph: the step graph over its pools.
        clock: monotonic seconds.
    """

    def __init__(self, graph: StepGraph, clock: Callable[[], float] = time.perf_counter) -> None:
        self.graph = graph
        self._sampler = Sampler(graph.vocab_size)
        self._clock = clock

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan and return a token or a failure for each of its samples."""
        for slot in plan.releases:
            self.graph.release(slot)
        for move in plan.moves:
            self.graph.copy(move.source, move.destination, move.length)
        tokens: dict[str, Token] = {}
        failures: dict[str, str] = {}
        started = self._clock()
        if plan.rows:
            self._decode(plan.rows, tokens, failures)
        decoded = self._clock()
        if plan.chunk is not None:
            self._prefill(plan.chunk, tokens, failures)
        return StepResult(
            tokens=tokens,
            failures=failures,
            decode_seconds=decoded - started,
            prefill_seconds=self._clock() - decoded,
        )

    def _decode(self, rows: tuple[Row, ...], tokens: dict[str, Token], failures: dict[str, str]) -> None:
        try:
            logits = self.graph.decode([row.token_id for row in rows], [row.length for row in rows])
        except Exception:
            logger.exception("a decode step of %d rows failed; trying its rows one by one", len(rows))
            self._decode_one_by_one(rows, tokens, failures)
            return
        best = logits.argmax(axis=1)
        for slot, row in enumerate(rows):
            if row.sample is not None:
                self._choose(logits[slot], int(best[slot]), row.sample, tokens, failures)

    def _decode_one_by_one(self, rows: tuple[Row, ...], tokens: dict[str, Token], failures: dict[str, str]) -> None:
        for slot, row in enumerate(rows):
            if row.sample is None:
                continue
            try:
                logits = self.graph.chunk(slot, [row.token_id], row.length - 1)[0]
            except Exception as error:
                logger.exception("request %s failed in slot %d", row.sample.request.request_id, slot)
                failures[row.sample.request.request_id] = _cause(error)
            else:
                self._choose(logits, int(logits.argmax()), row.sample, tokens, failures)

    def _prefill(self, chunk: Chunk, tokens: dict[str, Token], failures: dict[str, str]) -> None:
        try:
            logits = self.graph.chunk(chunk.slot, chunk.token_ids, chunk.start)[0]
        except Exception as error:
            logger.exception("request %s failed in prefill at position %d", chunk.request_id, chunk.start)
            failures[chunk.request_id] = _cause(error)
            return
        if chunk.sample is not None:
            self._choose(logits, int(logits.argmax()), chunk.sample, tokens, failures)

    def _choose(
        self, logits: _Logits, best: int, sample: Sample, tokens: dict[str, Token], failures: dict[str, str]
    ) -> None:
        request = sample.request
        try:
            tokens[request.request_id] = self._sampler.choose(logits, best, sample)
        except NotFinite as error:
            logger.error("request %s: %s", request.request_id, error)
            failures[request.request_id] = str(error)


def _cause(error: Exception) -> str:
    return f"the graph failed ({type(error).__name__})"
