"""Executes step plans: moves, sources, decode rows, chunks, and the choice of tokens.

It knows slots, tokens and logits; it knows neither clients nor text. A row on which the graph or the choice fails
gets a failure of its own: when a step raises, its rows are run again one by one. That is safe because a row writes only
at its own next positions or to a second buffer, and exact because a row alone gives the bits it gives among others.
When nothing of a step succeeds, the engine itself is put to the test.
"""

import logging
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from service.engine.probe import Probe
from service.engine.sampling import NotFinite, Sampler, check_finite
from service.engine.step_graph import StepGraph
from service.scheduling.plan import Chunk, Encode, Release, Sample, StepPlan, StepResult
from service.scheduling.request import Token

logger = logging.getLogger(__name__)

_Logits = NDArray[np.float32]


class Engine:
    """Runs one bundle's plans on its step graph.

    Args:
        graph: the step graph over its pools.
        clock: monotonic seconds.
        probe: tells a broken engine from requests that no engine could answer; without one none is taken for broken.
    """

    def __init__(
        self, graph: StepGraph, clock: Callable[[], float] = time.perf_counter, probe: Probe | None = None
    ) -> None:
        self.graph = graph
        self._probe = probe
        self._sampler = Sampler(graph.vocab_size)
        self._clock = clock

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan and return a token or a failure for each of its samples.

        Raises:
            EngineBroken: nothing of the plan succeeded, nor would anything else.
        """
        for change in plan.memory:
            if isinstance(change, Release):
                self.graph.release(change.slot)
            else:
                self.graph.copy(change.source, change.destination, change.length)
        tokens: dict[int, Token] = {}
        failures: dict[str, str] = {}
        times = [self._clock()]
        if plan.encodes:
            self._encode(plan.encodes, failures)
        times.append(self._clock())
        if plan.rows:
            self._decode(plan, tokens, failures)
        times.append(self._clock())
        if plan.prompts:
            self._read_together(plan.prompts, tokens, failures)
        for chunk in plan.chunks:
            self._prefill(chunk, tokens, failures)
        times.append(self._clock())
        if failures and self._probe is not None:
            slots = _slots(plan)
            if failures.keys() == slots.keys():
                self._probe.check(next(iter(slots.values())))  # which is lost anyway
        encode_seconds, decode_seconds, prefill_seconds = (end - start for start, end in pairwise(times))
        return StepResult(
            tokens=tokens,
            failures=failures,
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
            prefill_seconds=prefill_seconds,
        )

    def _encode(self, encodes: tuple[Encode, ...], failures: dict[str, str]) -> None:
        sources = self.graph.sources
        assert sources is not None, "the border refuses sources that nobody reads"
        try:
            made = sources.run([encode.source for encode in encodes])
        except Exception as error:
            if len(encodes) == 1:
                logger.exception("the source of request %s failed", encodes[0].request_id)
                failures[encodes[0].request_id] = _cause(error)
                return
            logger.exception("reading %d sources failed; trying them one by one", len(encodes))
            for encode in encodes:
                self._encode((encode,), failures)
            return
        for encode, states in zip(encodes, made, strict=True):
            self.graph.begin(encode.slot, states)

    def _decode(self, plan: StepPlan, tokens: dict[int, Token], failures: dict[str, str]) -> None:
        rows, first_slot = plan.rows, plan.first_slot
        real = [index for index, row in enumerate(rows) if row.request_id is not None]
        for index in real:
            self._begin(first_slot + index, rows[index].length - 1)
        try:
            logits = self.graph.decode([row.token_id for row in rows], [row.length for row in rows], real, first_slot)
        except Exception:
            logger.exception("a decode step of %d rows failed; trying its rows one by one", len(rows))
            for index in real:
                row, slot = rows[index], first_slot + index
                assert row.request_id is not None, "a parked row is not real"
                self._feed(Chunk(row.request_id, slot, row.length - 1, (row.token_id,), row.sample), tokens, failures)
            return
        best = logits.argmax(axis=1)
        for index in real:
            row, slot = rows[index], first_slot + index
            assert row.request_id is not None, "a parked row is not real"
            self._choose(logits[index], int(best[index]), row.request_id, row.sample, slot, tokens, failures)

    def _read_together(self, prompts: tuple[Chunk, ...], tokens: dict[int, Token], failures: dict[str, str]) -> None:
        for prompt in prompts:
            self._begin(prompt.slot, prompt.start)
        try:
            logits = self.graph.prompts(prompts[0].slot, [prompt.token_ids for prompt in prompts])
        except Exception:
            logger.exception("reading %d prompts together failed; trying them one by one", len(prompts))
            for prompt in prompts:
                self._prefill(prompt, tokens, failures)
            return
        for row, prompt in zip(logits, prompts, strict=True):
            self._choose(row, int(row.argmax()), prompt.request_id, prompt.sample, prompt.slot, tokens, failures)

    def _prefill(self, chunk: Chunk, tokens: dict[int, Token], failures: dict[str, str]) -> None:
        self._begin(chunk.slot, chunk.start)
        self._feed(chunk, tokens, failures)

    def _begin(self, slot: int, start: int) -> None:
        """Begin a sequence that has no source: those that have one began with it."""
        if start == 0 and self.graph.sources is None:
            self.graph.begin(slot)

    def _feed(self, chunk: Chunk, tokens: dict[int, Token], failures: dict[str, str]) -> None:
        try:
            logits = self.graph.chunk(chunk.slot, chunk.token_ids, chunk.start)[0]
        except Exception as error:
            logger.exception("request %s failed in slot %d at %d", chunk.request_id, chunk.slot, chunk.start)
            failures[chunk.request_id] = _cause(error)
            return
        self._choose(logits, int(logits.argmax()), chunk.request_id, chunk.sample, chunk.slot, tokens, failures)

    def _choose(
        self,
        logits: _Logits,
        best: int,
        request_id: str,
        sample: Sample | None,
        slot: int,
        tokens: dict[int, Token],
        failures: dict[str, str],
    ) -> None:
        """Choose a token if one is wanted; a prompt whose logits are not finite on the way need not go on."""
        try:
            if sample is None:
                check_finite(logits, best)
            else:
                tokens[slot] = self._sampler.choose(logits, best, sample)
        except NotFinite as error:
            logger.error("request %s: %s", request_id, error)
            failures[request_id] = str(error)


def _slots(plan: StepPlan) -> dict[str, int]:
    """Return a slot of each request that a step is for."""
    slots = {encode.request_id: encode.slot for encode in plan.encodes}
    slots.update((chunk.request_id, chunk.slot) for chunk in plan.reads)
    slots.update(
        (row.request_id, slot) for slot, row in enumerate(plan.rows, plan.first_slot) if row.request_id is not None
    )
    return slots


def _cause(error: Exception) -> str:
    return f"the graph failed ({type(error).__name__})"
