"""An engine that runs nothing: it says what each phase of a step would take, and when a request's answer ends."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from service.scheduling.latency import LatencyModel
from service.scheduling.non_negative import Triple
from service.scheduling.plan import StepPlan, StepResult
from service.scheduling.request import Request, Token
from service.scheduling.work import Phase, Work, plan_work

GOES_ON, ENDS = 0, 1
"""The only tokens there are; a prompt has none of them."""

_NEEDED: tuple[Phase, ...] = ("prefill", "decode")
_LAW = re.compile(r"(prefill|decode)=([^,]+),([^,]+),([^,]+)")


@dataclass(frozen=True, slots=True)
class Laws:
    """What a run, a token and an attended position cost in each phase, in seconds.

    Raises:
        ValueError: a phase is missing, or a coefficient is negative or not finite, or all of a phase are 0.
    """

    of: Mapping[Phase, Triple]

    def __post_init__(self) -> None:
        for phase in _NEEDED:
            law = self.of.get(phase)
            if law is None:
                raise ValueError(f"nothing is known of what {phase} costs")
            if not all(isfinite(coefficient) and coefficient >= 0 for coefficient in law) or not sum(law):
                raise ValueError(f"the law of {phase} is {law}, must be finite, none negative, and not all 0")

    @classmethod
    def learned(cls, latency: LatencyModel) -> "Laws":
        """Return what a latency model has learned while its bundle computed alone.

        Raises:
            ValueError: it has not learned enough.
        """
        known = {phase: latency.coefficients(phase) for phase in _NEEDED}
        return cls({phase: law for phase, law in known.items() if law is not None})

    @classmethod
    def parse(cls, texts: list[str]) -> "Laws":
        """Read laws such as "decode=0.004,0.0003,2e-8": seconds of a run, a token, an attended position.

        Raises:
            ValueError: a text is none, or a phase is missing.
        """
        laws: dict[Phase, Triple] = {}
        for text in texts:
            match = _LAW.fullmatch(text)
            try:
                if match is None:
                    raise ValueError
                constant, linear, quadratic = map(float, match.groups()[1:])
            except ValueError:
                raise ValueError(f"{text!r} is no law; write PHASE=RUN,TOKEN,ATTENDED in seconds") from None
            laws["prefill" if match[1] == "prefill" else "decode"] = (constant, linear, quadratic)
        return cls(laws)

    def predict(self, phase: Phase, work: Work) -> float:
        """Return the seconds that a run takes; nothing is known of encoding, which no trace asks for."""
        constant, linear, quadratic = self.of[phase]
        return constant * work.runs + linear * work.tokens + quadratic * work.attended


class VirtualEngine:
    """Executes plans in no time.

    Args:
        laws: what runs cost.
    """

    def __init__(self, laws: Laws) -> None:
        self._laws = laws
        self._output_tokens: dict[str, int] = {}

    def expect(self, request: Request, output_tokens: int) -> None:
        """Say where the answer of a request ends."""
        self._output_tokens[request.request_id] = output_tokens

    def forget(self, request_id: str) -> None:
        """Say that a request is over."""
        del self._output_tokens[request_id]

    def execute(self, plan: StepPlan) -> StepResult:
        """Return a token for each sample, and the seconds of each phase."""
        seconds = {phase: self._laws.predict(phase, work) for phase, work in plan_work(plan).items()}
        tokens: dict[int, Token] = {}
        for slot, row in enumerate(plan.rows, plan.first_slot):
            if row.sample is not None:
                tokens[slot] = self._token(row.sample.request, row.sample.num_output)
        for chunk in plan.reads:
            if chunk.sample is not None:
                tokens[chunk.slot] = self._token(chunk.sample.request, chunk.sample.num_output)
        return StepResult(
            tokens=tokens,
            failures={},
            decode_seconds=seconds.get("decode", 0.0),
            prefill_seconds=seconds.get("prefill", 0.0),
        )

    def _token(self, request: Request, num_output: int) -> Token:
        return _LAST if num_output + 1 >= self._output_tokens[request.request_id] else _OTHER


_LAST, _OTHER = Token(ENDS), Token(GOES_ON)
