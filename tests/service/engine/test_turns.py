"""Whoever is alone is alone, whoever is together waits for nobody but those, and nobody waits for itself."""

import random
import threading
from collections.abc import Callable

import pytest

from service.engine.turns import Turns

PATIENCE = 30.0


@pytest.fixture
def start():
    """Run functions on threads; those must have ended when the test has."""
    threads = []

    def run(function: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=function, daemon=True)
        threads.append(thread)
        thread.start()
        return thread

    yield run
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_in_a_crowd_nobody_meets_one_who_is_alone_and_all_get_their_turn(start) -> None:
    turns, state = Turns(), threading.Lock()
    together = alone = 0
    met: list[str] = []

    def one(number: int) -> None:
        nonlocal together, alone
        draw = random.Random(number)
        for _ in range(200):
            if draw.random() < 0.8:
                with turns.together(), turns.together():
                    with state:
                        together += 1
                        if alone:
                            met.append("one who was alone")
                    with state:
                        together -= 1
            else:
                with turns.alone(), turns.together():
                    with state:
                        alone += 1
                        if together or alone > 1:
                            met.append(f"{together} and {alone - 1}")
                    with state:
                        alone -= 1

    threads = [start(lambda number=number: one(number)) for number in range(6)]
    for thread in threads:
        thread.join(PATIENCE)
    assert met == []


def test_many_are_together_at_once(start) -> None:
    turns, all_inside = Turns(), threading.Barrier(3)

    def one() -> None:
        with turns.together():
            all_inside.wait(PATIENCE)

    for _ in range(3):
        start(one)


def test_who_waits_to_be_alone_goes_before_those_who_come_later(start) -> None:
    turns, order = Turns(), []
    waits = threading.Event()

    def alone() -> None:
        waits.set()
        with turns.alone():
            order.append("alone")

    def later() -> None:
        with turns.together():
            order.append("later")

    with turns.together():
        start(alone)
        assert waits.wait(PATIENCE)
        while not turns._num_lonely:
            pass
        late = start(later)
        with turns.together():  # goes on, though somebody waits
            order.append("within")
    late.join(PATIENCE)
    assert order == ["within", "alone", "later"]


def test_what_fails_leaves_nobody_outside() -> None:
    turns = Turns()
    for turn in (turns.together, turns.alone):
        with pytest.raises(ZeroDivisionError), turn():
            raise ZeroDivisionError
    with turns.alone():
        pass


def test_nobody_who_is_inside_can_wait_to_be_alone() -> None:
    turns = Turns()
    with turns.together(), pytest.raises(AssertionError, match="it would wait for itself"), turns.alone():
        pass
