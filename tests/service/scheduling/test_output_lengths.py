"""What is learned of the lengths of answers."""

import random

import pytest

from service.scheduling.output_lengths import ENOUGH, OutputLengths


def test_before_enough_was_seen_answers_are_as_long_as_they_may_be() -> None:
    lengths = OutputLengths()
    for _ in range(ENOUGH - 1):
        lengths.observe(100, 10)
    assert not lengths.is_known
    assert lengths.remaining(100, 0, 0.5) == 100
    lengths.observe(100, 10)
    assert lengths.is_known
    assert lengths.remaining(100, 0, 0.5) == 10


def test_callers_who_ask_for_what_they_get_are_told_apart_from_those_who_leave_it_open() -> None:
    lengths = OutputLengths()
    for _ in range(50):
        lengths.observe(30, 30)
        lengths.observe(256, 40)
    assert lengths.remaining(25, 0, 0.5) == 25
    assert lengths.remaining(256, 0, 0.5) == 40


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_quantile_is_that_of_the_answers_that_are_longer_than_what_is_there(quantile) -> None:
    draw, lengths = random.Random(0), OutputLengths()
    seen = [draw.randrange(1, 201) for _ in range(256)]
    for number in seen:
        lengths.observe(200, number)
    for num_output in (0, 50, 120):
        longer = sorted(number for number in seen if number > num_output)
        assert num_output + lengths.remaining(200, num_output, quantile) == longer[int(quantile * len(longer))]


def test_an_answer_longer_than_all_may_go_on_to_its_end() -> None:
    lengths = OutputLengths()
    for _ in range(50):
        lengths.observe(200, 20)
    assert lengths.remaining(200, 150, 0.5) == 50
    assert lengths.remaining(200, 200, 0.5) == 1


def test_old_answers_are_forgotten() -> None:
    lengths = OutputLengths()
    for number in (150, 20):
        for _ in range(300):
            lengths.observe(200, number)
    assert lengths.remaining(200, 0, 0.99) == 20
