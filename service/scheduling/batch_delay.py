"""Whether an encoder should wait a little for company before it runs what is there.

A batch costs less for each row the more rows it has, so waiting can save time in all, and it always costs those who
wait. Arrivals that are independent of each other never make it worth while: by the next one to come, the busy server
has gathered a batch anyway. Arrivals in bursts can, as those of clients who were all answered together: then the next
one is very near. So the decision rests on the gaps between recent arrivals as they are, not on their mean.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_GAPS = 32  # newest arrivals that tell when the next one comes
_ENOUGH = 16  # gaps before anything is concluded from them
_PARTS = (0.5, 0.75, 1.0)  # of the arrivals that are near enough: so many to wait for are tried
_WORTHWHILE = 0.05  # of the seconds that running at once takes: less may be chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """What waits, and what it costs alone and together.

    Args:
        rows: texts that wait.
        run: seconds of a run, whatever is in it.
        row: seconds that each text adds.
    """

    rows: int
    run: float
    row: float

    def seconds_at_once(self, gap: float) -> float:
        """Return the latency, over all texts, if the batch runs now and the next text, after `gap`, in the next one."""
        batch = self.run + self.rows * self.row
        return self.rows * batch + max(0.0, batch - gap) + self.run + self.row

    def seconds_after(self, delay: float, gap: float) -> float:
        """Return the same if the batch runs with the next text, or without it when it has not come after `delay`."""
        if gap > delay:
            return self.rows * delay + self.seconds_at_once(gap - delay)
        return self.rows * gap + (self.rows + 1) * (self.run + (self.rows + 1) * self.row)


def best_delay(company: Company, gaps: Sequence[float], limit: float) -> float:
    """Return how long to wait for the next text so that the mean latency is least; 0 if that saves too little.

    Only the next text counts, so the answer errs on the side of running now.

    Args:
        company: what waits.
        gaps: seconds until the next text, each as likely as any other.
        limit: of the answer, in seconds.
    """
    # What one text waits, and what all take longer for one more, must be less than the run that is saved.
    most = min(limit, (company.run - company.rows * company.row) / (company.rows + 1))
    delays = sorted(gap for gap in gaps if gap < most)
    if not delays:
        return 0.0
    now = sum(company.seconds_at_once(gap) for gap in gaps)
    delays = [delays[round(part * (len(delays) - 1))] for part in _PARTS]
    found = [(sum(company.seconds_after(delay, gap) for gap in gaps), delay) for delay in delays]
    seconds, delay = min(found, default=(now, 0.0))
    return delay if seconds < (1 - _WORTHWHILE) * now else 0.0


class Arrivals:
    """When calls came."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._gaps: deque[float] = deque(maxlen=_GAPS)

    def note(self, now: float) -> None:
        """A call came."""
        if self._last is not None:
            self._gaps.append(max(0.0, now - self._last))
        self._last = now

    def next_gaps(self, now: float) -> list[float]:
        """Return the seconds until the next arrival if it comes as one of the recent did; none if too few are known."""
        if self._last is None or len(self._gaps) < _ENOUGH:
            return []
        elapsed = now - self._last
        return [gap - elapsed for gap in self._gaps if gap > elapsed]
