"""How often what has failed is tried again."""

from service.app.backoff import Backoff


def delays(backoff: Backoff, now: float = 0.0) -> list[float]:
    found = []
    while (delay := backoff.next_delay(now)) is not None:
        found.append(delay)
    return found


def test_delays_double_up_to_the_longest_and_end() -> None:
    assert delays(Backoff(tries=9, first_seconds=0.5)) == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert delays(Backoff(tries=0, first_seconds=1.0)) == []
    assert delays(Backoff(tries=2000, first_seconds=1.0))[-1] == 60


def test_what_comes_up_only_to_fail_again_has_no_more_tries_than_what_never_does() -> None:
    backoff = Backoff(tries=3, first_seconds=1.0, steady_seconds=100.0)
    backoff.came_up(0.0)
    for now, delay in ((50.0, 1.0), (149.0, 2.0), (248.0, 4.0)):
        assert backoff.next_delay(now) == delay
        backoff.came_up(now)
    assert backoff.next_delay(347.0) is None


def test_long_service_forgets_earlier_failures() -> None:
    backoff = Backoff(tries=1, first_seconds=1.0, steady_seconds=100.0)
    backoff.came_up(0.0)
    assert backoff.next_delay(10.0) == 1.0
    backoff.came_up(20.0)
    assert backoff.next_delay(120.0) == 1.0
    assert backoff.next_delay(121.0) is None, "it has not come up since"
