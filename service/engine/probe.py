"""A known input that a sound engine answers alike every time: with the same bits, or as nearly as its device can.

When all that a step was asked for fails, row by row, either every one of these requests is one that no engine could
answer, or the engine is broken: its weights have changed in memory, or memory is exhausted. Counting failures cannot
tell, and whoever sends nothing but bad requests could have a model restarted. Asking the engine can.
"""

import logging
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from service.bundle import FoundBundle
from service.engine.agreement import Agreement
from service.engine.encode_graph import EncodeGraph
from service.engine.encode_self_test import golden_items
from service.engine.graph import HostGraph, feed
from service.engine.self_test import golden_prompt

logger = logging.getLogger(__name__)

Answer = NDArray[np.float32]

_PROMPT_TOKENS = 32  # enough for all that a graph does


class EngineBroken(Exception):
    """The engine fails whatever it is given; it has to be loaded again."""


class Probe:
    """Asks an engine what it could answer when it was loaded.

    Args:
        run: answers the known input in a slot whose content nobody needs; an encoder has no slots.
        agreement: what it takes for an answer to be the one that was given at load.
    """

    def __init__(self, run: Callable[[int], Answer], agreement: Agreement) -> None:
        self._run = run
        self._agreement = agreement
        self._expected = run(0)

    def check(self, slot: int = 0) -> None:
        """Ask again.

        Raises:
            EngineBroken: the graph fails, or answers otherwise than it did.
        """
        try:
            answer = self._run(slot)
        except Exception as error:
            logger.exception("the graph fails on what it could answer when it was loaded")
            raise EngineBroken(f"the graph fails whatever it is given ({type(error).__name__})") from error
        check = self._agreement.check("an answer and that at load", [(answer, self._expected)], "a known input")
        if not check.passed:
            raise EngineBroken(
                f"the graph computes otherwise than when it was loaded: {check.name}: {check.measured:.3g}, allowed "
                f"{check.bound:.3g}"
            )


def generation_probe(found: FoundBundle, graph: HostGraph) -> Probe:
    """Return a probe that reads a source if there is one, prefills, and decodes one token; slot 0 must be free."""
    prompt, source = golden_prompt(found)
    prompt = prompt[: min(_PROMPT_TOKENS, graph.capacity - 1)]

    def run(slot: int) -> Answer:
        graph.begin(slot, graph.sources.run([source])[0] if graph.sources and source else None)
        read = feed(graph, slot, prompt)[0].copy()
        written = graph.decode(prompt[-1:], [len(prompt) + 1], [0], slot)[0]
        answer = np.stack((read, written))
        graph.release(slot)
        return answer

    return Probe(run, Agreement.of(found.manifest))


def encoder_probe(found: FoundBundle, graph: EncodeGraph) -> Probe:
    """Return a probe that reads the shortest text, or an image, of the golden run."""
    item = min(golden_items(found, graph), key=lambda item: item.length)
    return Probe(lambda slot: graph.run([item])[0], Agreement.of(found.manifest))
