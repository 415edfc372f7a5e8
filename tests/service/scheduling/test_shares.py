"""Fair shares, alone."""

import random

from service.scheduling.shares import MAX_TENANTS, QUANTUM_SECONDS, Shares


def serve(shares: Shares, present: list[str], steps: int, seconds: float = 0.1) -> dict[str, float]:
    """Serve whoever has the lowest rank, again and again."""
    served = dict.fromkeys(present, 0.0)
    for _ in range(steps):
        ranks = shares.ranks()
        tenant = min(present, key=lambda one: (ranks[one], one))
        shares.charge(tenant, seconds)
        served[tenant] += seconds
    return served


def test_tenants_who_are_all_here_get_the_same() -> None:
    shares, present = Shares(), ["a", "b", "c"]
    for tenant in present:
        shares.enter(tenant)
    served = serve(shares, present, 900)
    assert max(served.values()) - min(served.values()) <= 2 * QUANTUM_SECONDS


def test_who_was_away_has_not_saved_up_time() -> None:
    shares = Shares()
    shares.enter("here")
    serve(shares, ["here"], 600)
    shares.enter("comes")
    served = serve(shares, ["comes", "here"], 200)
    assert abs(served["comes"] - served["here"]) <= 2 * QUANTUM_SECONDS


def test_leaving_and_coming_back_gains_nothing() -> None:
    shares = Shares()
    shares.enter("steady")
    served = {"steady": 0.0, "restless": 0.0}
    for _ in range(300):
        shares.enter("restless")
        for tenant, seconds in serve(shares, ["restless", "steady"], 2).items():
            served[tenant] += seconds
        shares.leave("restless")
    assert served["restless"] <= served["steady"] + 2 * QUANTUM_SECONDS


def test_no_stream_of_newcomers_holds_anyone_up_for_ever() -> None:
    shares = Shares()
    shares.enter("first")
    shares.charge("first", 30.0)
    served = 0.0
    for number in range(2000):
        name = f"newcomer {number}"
        shares.enter(name)
        found = serve(shares, [name, "first"], 1)
        served += found["first"]
        shares.leave(name)
    assert served > 30.0


def test_memory_is_bounded_whatever_names_are_sent() -> None:
    shares, draw = Shares(), random.Random(0)
    names = [shares.enter(f"tenant {number}") for number in range(MAX_TENANTS + 50)]
    assert names[-50:] == [""] * 50
    for name in names:
        shares.leave(name)
    for number in range(10_000):
        name = shares.enter(f"other {number}")
        shares.charge(name, draw.random())
        shares.leave(name)
    assert len(shares._seconds) <= 2 * MAX_TENANTS + 1
