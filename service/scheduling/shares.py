"""Fair shares: of several tenants who all have requests waiting, each gets as much of the engine's time as the others.

As in a virtual token counter (Sheng et al., 2024, arXiv:2401.00588), but what is counted is the time that each request
really took, so a long context costs what it costs. Whoever comes back begins where the least served of those present
is: nobody saves up time while away, and nobody loses by it.
"""

QUANTUM_SECONDS = 1.0
"""Tenants whose times differ by less are equals; among equals the deadline decides."""

MAX_TENANTS = 1024
"""Tenants that are told apart; all others share."""


class Shares:
    """Seconds that each tenant has had, counted while it has requests here."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._requests: dict[str, int] = {}

    def enter(self, tenant: str) -> str:
        """Count a request of a tenant; return the name under which it is counted, which is "" beyond the limit."""
        if tenant not in self._requests and len(self._requests) >= MAX_TENANTS:
            tenant = ""
        if tenant not in self._requests:
            self._forget_all_but(MAX_TENANTS)
            self._seconds[tenant] = max(self._seconds.get(tenant, 0.0), self._least)
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

    def rank(self, tenant: str) -> int:
        """Return how many quanta a tenant who is here has had beyond the least served; the lowest goes first."""
        return int((self._seconds[tenant] - self._least) / QUANTUM_SECONDS)

    def ranks(self) -> dict[str, int]:
        """Return the rank of each tenant who is here."""
        least = self._least
        return {tenant: int((self._seconds[tenant] - least) / QUANTUM_SECONDS) for tenant in self._requests}

    @property
    def _least(self) -> float:
        return min((self._seconds[tenant] for tenant in self._requests), default=0.0)

    def _forget_all_but(self, number: int) -> None:
        """Forget those away who had the least: they would begin with the least served anyway, or nearly so."""
        if len(self._seconds) >= 2 * number:
            away = sorted(self._seconds.keys() - self._requests.keys(), key=lambda tenant: self._seconds[tenant])
            for tenant in away[:number]:
                del self._seconds[tenant]
