"""One cost law, learned while it is used: seconds = constant + linear x tokens + quadratic x attended positions.

The fit is least squares of relative errors. An observation counts for less the older it is: its weight falls fast at
first, so that the newest few hundred decide, and then slowly, so that what has not happened for a while is not
forgotten while nothing newer says what it costs.

Noise of a shared machine is one-sided: a step takes longer than it should, hardly ever less. So a slow observation is
weighed by its own time and not by the expected one, and however slow it is, its pull is bounded. When nearly all of
several observations in a row are off to one side it is no noise: the machine has another speed now, and all that was
learned is rescaled to it at once.
"""

from collections.abc import Mapping
from math import exp, isfinite
from statistics import quantiles

from service.scheduling.non_negative import NUM_SUMS, Triple, products, solve
from service.scheduling.work import Work

ENOUGH = 16
"""Observations before anything is predicted."""

_MEMORIES = (256, 20_000)  # observations after which the newer and the older memory keep 1/e
_OLD_SHARE = 0.05  # of a full old memory's weight in a full new one's
_SLOW = 1.5  # times the prediction: beyond it an observation counts for less
_SOLVE_ALWAYS = 64  # observations up to which each is followed by a fit, as every eighth is later
_WITNESSES = 16  # observations that tell whether the speed has changed
_SAME_SPEED = 1.25
_KEPT = tuple(exp(-1 / memory) for memory in _MEMORIES)


class CostLaw:
    """The law of one kind of run. Learned on one thread; `coefficients` and `predict` may be read on any."""

    def __init__(self) -> None:
        self.coefficients: Triple | None = None
        self.observations = 0
        self._sums = [[0.0] * NUM_SUMS for _ in _MEMORIES]
        self._ratios: list[float] = []

    def predict(self, work: Work) -> float | None:
        """Return seconds, or None before enough was observed; they never fall when work grows."""
        coefficients = self.coefficients
        if coefficients is None:
            return None
        constant, linear, quadratic = coefficients
        return constant * work.runs + linear * work.tokens + quadratic * work.attended

    def observe(self, work: Work, seconds: float) -> None:
        """Learn that this work took so long; both are finite, seconds and runs positive."""
        predicted = self.predict(work)
        scale = max(seconds, predicted or 0.0)
        trust = min(1.0, _SLOW * predicted / seconds) if predicted else 1.0
        added = products(work, seconds, trust / (scale * scale))
        self._sums = [
            [keep * old + new for old, new in zip(sums, added, strict=True)]
            for keep, sums in zip(_KEPT, self._sums, strict=True)
        ]
        self.observations += 1
        if predicted:
            self._watch_speed(seconds / predicted)
        count = self.observations
        if count >= ENOUGH and (count <= _SOLVE_ALWAYS or count % 8 == 0):
            self._solve()

    def _watch_speed(self, ratio: float) -> None:
        self._ratios.append(ratio)
        if len(self._ratios) < _WITNESSES:
            return
        lower, median, upper = quantiles(self._ratios, n=4)
        self._ratios = []
        if lower > _SAME_SPEED or upper < 1 / _SAME_SPEED:
            # As if all had been measured at the new speed: seconds times `median`, weights over its square.
            self._sums = [
                [*(old / median**2 for old in sums[:6]), *(old / median for old in sums[6:])] for sums in self._sums
            ]
            self._solve()

    def _solve(self) -> None:
        newer, older = self._sums
        share = _OLD_SHARE * _MEMORIES[0] / _MEMORIES[1]
        self.coefficients = solve([new + share * old for new, old in zip(newer, older, strict=True)])

    # Kept across restarts

    def to_dict(self) -> dict[str, object]:
        """Return all that was learned, for JSON."""
        return {"observations": self.observations, "sums": self._sums}

    @classmethod
    def from_dict(cls, state: Mapping[str, object]) -> "CostLaw":
        """Return the law that `to_dict` wrote.

        Raises:
            ValueError: it wrote something else.
        """
        law = cls()
        observations, sums = state.get("observations"), state.get("sums")
        if type(observations) is not int or observations < 0:
            raise ValueError(f"observations is {observations!r}, must be a count")
        if not isinstance(sums, list) or [_num_sums(memory) for memory in sums] != [NUM_SUMS] * len(_MEMORIES):
            raise ValueError(f"sums must be {len(_MEMORIES)} lists of {NUM_SUMS} finite numbers, none negative")
        law.observations, law._sums = observations, [list(map(float, memory)) for memory in sums]
        if observations >= ENOUGH:
            try:
                law._solve()
            except ArithmeticError as error:
                raise ValueError(f"sums are of no observations: {error}") from error
            if not (law.coefficients and isfinite(total := sum(law.coefficients)) and total > 0):
                raise ValueError(f"sums are of no observations: they make the coefficients {law.coefficients}")
        return law


def _num_sums(memory: object) -> int:
    """Return how many sums these are; 0 if they are none: all are of products that cannot be negative."""
    if not isinstance(memory, list):
        return 0
    return len(memory) if all(type(x) in (int, float) and isfinite(x) and x >= 0 for x in memory) else 0
