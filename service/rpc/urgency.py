"""How much of a hurry a request is in: its priority, its latency budget, the call's own deadline, and its tenant."""

import math
from typing import Any

from service.encode_loop import EncodeLoop, Urgency
from service.errors import InvalidField
from service.rpc.registration import Context

MAX_PRIORITY = 100
MAX_BUDGET_SECONDS = 86_400
TENANT_KEY = "x-attendant-tenant"
"""The metadata key of a tenant's name; who sends none is of the same nameless tenant."""
MAX_TENANT_CHARACTERS = 128


def read_priority(message: Any) -> int:
    """Return the priority of a request.

    Raises:
        InvalidField: it is out of range.
    """
    priority: int = message.priority
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidField("priority", priority, f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    return priority


def read_budget(message: Any) -> float | None:
    """Return the latency budget of a request in seconds, None if it has none.

    Raises:
        InvalidField: it is out of range.
    """
    if not message.HasField("latency_budget"):
        return None
    seconds: float = message.latency_budget.seconds + message.latency_budget.nanos / 1e9
    if not 0 < seconds <= MAX_BUDGET_SECONDS:
        raise InvalidField("latency_budget", f"{seconds:.7g} s", f"must be in (0, {MAX_BUDGET_SECONDS}] seconds")
    return seconds


def tenant_of(context: Context) -> str:
    """Return the name that a call's metadata gives, cut to a sensible length."""
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY and isinstance(value, str):
            return value[:MAX_TENANT_CHARACTERS]
    return ""


def read_urgency(message: Any, arrival: float, context: Context) -> Urgency:
    """Return all of it; the earlier of the call's deadline and the end of the budget counts.

    Raises:
        InvalidField: priority or budget are out of range.
    """
    budget, remaining = read_budget(message), context.time_remaining()
    deadline = min(
        math.inf if budget is None else arrival + budget,
        math.inf if remaining is None else EncodeLoop.clock() + remaining,
    )
    return Urgency(
        arrival=arrival,
        deadline=None if deadline == math.inf else deadline,
        priority=read_priority(message),
        tenant=tenant_of(context),
    )
