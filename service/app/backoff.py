"""How often, and after how long, what has failed is tried again."""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Doubles the delay from try to try, up to a limit of tries; begins anew after a long time without a failure.

    What comes up only to fail again soon has not come up: its next delay is longer all the same.

    Args:
        tries: most tries in a row.
        first_seconds: before the first one.
        longest_seconds: before any.
        steady_seconds: of service after which earlier tries are forgotten.
    """

    tries: int
    first_seconds: float
    longest_seconds: float = 60.0
    steady_seconds: float = 600.0
    spent: int = field(default=0, init=False)
    _up_since: float | None = field(default=None, init=False)

    def came_up(self, now: float) -> None:
        """It serves, since now."""
        self._up_since = now

    def next_delay(self, now: float) -> float | None:
        """Take one try and return how long to wait before it, or None if none is left."""
        if self._up_since is not None and now - self._up_since >= self.steady_seconds:
            self.spent = 0
        self._up_since = None
        if self.spent >= self.tries:
            return None
        self.spent += 1
        return min(self.first_seconds * 2.0 ** min(self.spent - 1, 30), self.longest_seconds)
