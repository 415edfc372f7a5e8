"""Fair shares: of several tenants who all have requests waiting, each gets as much of the engine's time as the others.

As in a virtual token counter (Sheng et al., 2024, arXiv:2401.00588), but what is counted is the time that each request
really took, so a long context costs what it costs. Whoever comes begins where a tenant would be who had always had a
fair share: nobody saves up time while away, and no stream of newcomers holds anyone up for ever.
"""

QUANTUM_SECONDS = 1.0
"""Tenants whose times differ by less are equals; among equals priority and deadline decide."""

MAX_TENANTS = 1024
"""Tenants that are told apart; all others share."""


class Shares:
    """Seconds that each tenant has had, counted while it has requests here."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._requests: dict[str, int] = {}
        self._fair_share = 0.0

    def enter(self, tenant: str) -> str:
        """Count a request of a tenant; return the name under which it is counted, which is "" beyond the limit."""
        if tenant not in self._requests and len(self._requests) >= MAX_TENANTS:
            tenant = ""
        if tenant not in self._requests:
            self._forget_the_away()
            self._seconds[tenant] = max(self._seconds.get(tenant, 0.0), self._fair_share)
        self._requests[tenant] = self._requests.get(tenant, 0) + 1
        return tenant

    def leave(self, tenant: str) -> None:
        """Count one request less."""
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]

    def charge(self, tenant: str, seconds: float) -> None:
        """Count time that was spent on a tenant who is here."""
        self._seconds[tenant] += seconds
        self._fair_share += seconds / len(self._requests)

    def rank(self, tenant: str) -> int:
        """Return the rank of one tenant who is here, as `ranks` does."""
        return self.ranks()[tenant]

    def ranks(self) -> dict[str, int]:
        """Return how many quanta each tenant who is here has had beyond the least served; the lowest goes first."""
        least = min((self._seconds[tenant] for tenant in self._requests), default=0.0)
        return {tenant: int((self._seconds[tenant] - least) / QUANTUM_SECONDS) for tenant in self._requests}

    def _forget_the_away(self) -> None:
        """Forget who is away and would begin with a fair share anyway."""
        if len(self._seconds) >= 2 * MAX_TENANTS:
            self._seconds = {
                tenant: seconds
                for tenant, seconds in self._seconds.items()
                if tenant in self._requests or seconds > self._fair_share
            }
