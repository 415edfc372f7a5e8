"""Executes step plans: moves, sources, decode rows, chunks, and the choice of tokens.

It knows slots, tokens and logits; it knows neither clients nor text. A row on which the graph or the choice fails
gets a failure of its own: when a step raises, its rows are run again one by one. That is safe because a row writes only
at its own next positions or to a second buffer, and exact because a row alone gives the bits it gives among others.
When nothing of a step succeeds, the engine itself is put to the test.
"""

import logging
from collections.abc import Callable
from typing import Any

from service.engine.choosing import Chooser, HostChooser, Outcome, Wanted
from service.engine.graph import Graph
from service.engine.probe import Probe
from service.scheduling.plan import Chunk, Encode, Release, StepPlan, StepResult

logger = logging.getLogger(__name__)


class Engine:
    """Runs one bundle's plans on its step graph.

    Args:
        graph: the step graph over its states.
        chooser: chooses tokens from what `graph` says of logits; from arrays of the host if None.
        probe: tells a broken engine from requests that no engine could answer; without one none is taken for broken.
    """

    def __init__(self, graph: Graph[Any], chooser: Chooser[Any] | None = None, probe: Probe | None = None) -> None:
        self.graph = graph
        self._probe = probe
        self._chooser: Chooser[Any] = chooser or HostChooser(graph.vocab_size)

    def prepare(self) -> None:
        """Do what has to be done once, on the thread that is to call `execute`, before anything is served."""
        self._chooser.prepare()

    @property
    def waits(self) -> bool:
        """Whether `execute` waits for a device, and has time for something else."""
        return self._chooser.waits

    def execute(self, plan: StepPlan, meanwhile: Callable[[], object] = lambda: None) -> StepResult:
        """Carry out a plan and return a token or a failure for each of its samples.

        Args:
            plan: the step.
            meanwhile: is called once a device, if there is one, has all to do that the plan asks for.

        Raises:
            EngineBroken: nothing of the plan succeeded, nor would anything else.
        """
        with self._chooser.turn():
            return self._execute(plan, meanwhile)

    def _execute(self, plan: StepPlan, meanwhile: Callable[[], object]) -> StepResult:
        for change in plan.memory:
            if isinstance(change, Release):
                self.graph.release(change.slot)
            else:
                self.graph.copy(change.source, change.destination, change.length)
        outcome = Outcome()
        self._chooser.start()
        if plan.encodes:
            self._encode(plan.encodes, outcome)
        self._chooser.mark()
        if plan.rows:
            self._decode(plan, outcome)
        self._chooser.mark()
        if plan.prompts:
            self._read_together(plan.prompts, outcome)
        for chunk in plan.chunks:
            self._prefill(chunk, outcome)
        self._chooser.mark()
        encode_seconds, decode_seconds, prefill_seconds = self._chooser.finish(outcome, meanwhile)
        failures = outcome.failures
        if failures and self._probe is not None and failures.keys() == plan.request_ids:
            self._probe.check(min(plan.slots(failures.keys())))  # which is lost anyway
        return StepResult(
            tokens=outcome.tokens,
            failures=failures,
            encode_seconds=encode_seconds,
            decode_seconds=decode_seconds,
            prefill_seconds=prefill_seconds,
        )

    def _encode(self, encodes: tuple[Encode, ...], outcome: Outcome) -> None:
        sources = self.graph.sources
        assert sources is not None, "the border refuses sources that nobody reads"
        try:
            made = sources.run([encode.source for encode in encodes])
        except Exception as error:
            if len(encodes) == 1:
                logger.exception("the source of request %s failed", encodes[0].request_id)
                outcome.failures[encodes[0].request_id] = _cause(error)
                return
            logger.exception("reading %d sources failed; trying them one by one", len(encodes))
            for encode in encodes:
                self._encode((encode,), outcome)
            return
        for encode, states in zip(encodes, made, strict=True):
            self.graph.begin(encode.slot, states)

    def _decode(self, plan: StepPlan, outcome: Outcome) -> None:
        rows, first_slot = plan.rows, plan.first_slot
        wanted: dict[int, Wanted] = {
            index: (row.request_id, first_slot + index, row.sample)
            for index, row in enumerate(rows)
            if row.request_id is not None
        }
        for index in wanted:
            if rows[index].length == 1:
                self._begin(first_slot + index)
        try:
            logits = self.graph.decode(
                [row.token_id for row in rows], [row.length for row in rows], [*wanted], first_slot
            )
        except Exception:
            logger.exception("a decode step of %d rows failed; trying its rows one by one", len(rows))
            for index, (request_id, slot, sample) in wanted.items():
                row = rows[index]
                self._feed(Chunk(request_id, slot, row.length - 1, (row.token_id,), sample), outcome)
            return
        self._chooser.take(logits, wanted, outcome)

    def _read_together(self, prompts: tuple[Chunk, ...], outcome: Outcome) -> None:
        for prompt in prompts:
            self._begin(prompt.slot)
        try:
            logits = self.graph.prompts(prompts[0].slot, [prompt.token_ids for prompt in prompts])
        except Exception:
            logger.exception("reading %d prompts together failed; trying them one by one", len(prompts))
            for prompt in prompts:
                self._prefill(prompt, outcome)
            return
        self._chooser.take(logits, dict(enumerate(map(_wanted, prompts))), outcome)

    def _prefill(self, chunk: Chunk, outcome: Outcome) -> None:
        if chunk.start == 0:
            self._begin(chunk.slot)
        self._feed(chunk, outcome)

    def _begin(self, slot: int) -> None:
        """Begin a sequence that has no source: those that have one began with it."""
        if self.graph.sources is None:
            self.graph.begin(slot)

    def _feed(self, chunk: Chunk, outcome: Outcome) -> None:
        try:
            logits = self.graph.chunk(chunk.slot, chunk.token_ids, chunk.start)
        except Exception as error:
            logger.exception("request %s failed in slot %d at %d", chunk.request_id, chunk.slot, chunk.start)
            outcome.failures[chunk.request_id] = _cause(error)
            return
        self._chooser.take(logits, {0: _wanted(chunk)}, outcome)


def _wanted(chunk: Chunk) -> Wanted:
    return chunk.request_id, chunk.slot, chunk.sample


def _cause(error: Exception) -> str:
    return f"the graph failed ({type(error).__name__})"
