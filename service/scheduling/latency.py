"""The latency model of one bundle: what each phase costs, learned from every run, and how wrong it has been.

Bundles share the processors, so a cost depends on how many of them compute at the moment: each number of active bundles
has a law of its own, and one that is not known yet is taken from the nearest number that is. The caller says how many
are active.

Learned on one thread, where `error` is read, too; everything else may be read on any.
"""

from collections import deque
from collections.abc import Mapping
from math import isfinite
from statistics import median

from service.scheduling.cost_law import CostLaw
from service.scheduling.non_negative import Triple
from service.scheduling.work import Phase, Work

PHASES: tuple[Phase, ...] = ("encode", "prefill", "decode")
MAX_ACTIVE = 4
"""As many active bundles, or more, share one law."""

TRUSTED_OBSERVATIONS = 64
TRUSTED_ERROR = 0.5
"""From how many runs on, and up to which median relative error, decisions may rest on what is predicted."""

_TRUST_EVERY = 16  # observations between two judgements
_ERRORS = 256  # newest predictions that the error is taken over


class LatencyModel:
    """Predicts how long a run of a bundle's graph takes. It begins to after a few runs of a phase."""

    def __init__(self) -> None:
        self._laws: dict[Phase, dict[int, CostLaw]] = {phase: {} for phase in PHASES}
        self._errors: dict[Phase, deque[float]] = {phase: deque(maxlen=_ERRORS) for phase in PHASES}
        self._trusted: frozenset[Phase] = frozenset()

    def observe(self, phase: Phase, work: Work, seconds: float, active: int = 1) -> bool:
        """Learn that a run took so long.

        Args:
            phase: of the run.
            work: what was run.
            seconds: what it took.
            active: bundles that computed meanwhile, this one included.

        Returns:
            False if nothing can be learned, because a number is not finite, or seconds, runs or tokens are not
            positive.
        """
        if not all(map(isfinite, (*work, seconds))) or min(work.runs, work.tokens, seconds) <= 0 or work.attended < 0:
            return False
        predicted = self.predict(phase, work, active)
        if predicted is not None:
            self._errors[phase].append(abs(predicted - seconds) / seconds)
        key = _key(active)
        laws = self._laws[phase]
        if key not in laws:
            self._laws[phase] = laws = {**laws, key: CostLaw()}  # never changed while another thread reads it
        laws[key].observe(work, seconds)
        if self.observations(phase) % _TRUST_EVERY == 0:
            self._judge(phase)
        return True

    def _judge(self, phase: Phase) -> None:
        error = self.error(phase)
        is_trusted = self.observations(phase) >= TRUSTED_OBSERVATIONS and (error is None or error <= TRUSTED_ERROR)
        self._trusted = self._trusted | {phase} if is_trusted else self._trusted - {phase}

    def is_trusted(self, phase: Phase) -> bool:
        """Whether decisions may rest on what is predicted of a phase."""
        return phase in self._trusted

    def predict(self, phase: Phase, work: Work, active: int = 1) -> float | None:
        """Return the seconds that a run will take, or None before enough was observed; more work never takes less."""
        law = self._nearest(phase, active)
        return None if law is None else law.predict(work)

    def coefficients(self, phase: Phase, active: int = 1) -> Triple | None:
        """Return what a run, a token and an attended position cost in seconds, or None before enough was observed."""
        law = self._nearest(phase, active)
        return None if law is None else law.coefficients

    def error(self, phase: Phase) -> float | None:
        """Return the median of the newest relative errors; each run was predicted before it was learned from."""
        errors = sorted(self._errors[phase])
        return median(errors) if errors else None

    def observations(self, phase: Phase) -> int:
        """Return how many runs were learned from."""
        return sum(law.observations for law in self._laws[phase].values())

    def _nearest(self, phase: Phase, active: int) -> CostLaw | None:
        """Return the fitted law of the nearest number of active bundles, of two the higher."""
        laws, key = self._laws[phase], _key(active)
        fitted = [known for known, law in laws.items() if law.coefficients is not None]
        return laws[min(fitted, key=lambda known: (abs(known - key), -known))] if fitted else None

    # Kept across restarts

    def to_dict(self) -> dict[str, object]:
        """Return all that was learned, for JSON; errors begin anew."""
        return {
            phase: {str(key): law.to_dict() for key, law in laws.items()} for phase, laws in self._laws.items() if laws
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over what another model's `to_dict` returned, in place of all that was learned here.

        Raises:
            ValueError: it is something else; nothing has changed.
        """
        laws: dict[Phase, dict[int, CostLaw]] = {phase: {} for phase in PHASES}
        for name, kept in state.items():
            phase = next((phase for phase in PHASES if phase == name), None)
            if phase is None or not isinstance(kept, dict):
                raise ValueError(f"{name!r} is no phase with its laws; phases are {', '.join(PHASES)}")
            for key, law in kept.items():
                if key not in _KEYS or not isinstance(law, dict):
                    raise ValueError(
                        f"{name}: {key!r} is no number of active bundles with its law; must be 1 to {MAX_ACTIVE}"
                    )
                laws[phase][int(key)] = CostLaw.from_dict(law)
        self._laws = laws
        self._errors = {phase: deque(maxlen=_ERRORS) for phase in PHASES}
        for phase in PHASES:
            self._judge(phase)


_KEYS = frozenset(str(key) for key in range(1, MAX_ACTIVE + 1))


def _key(active: int) -> int:
    return min(max(active, 1), MAX_ACTIVE)
