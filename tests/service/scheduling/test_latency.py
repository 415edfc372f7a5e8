"""The latency model against known cost laws: what it learns through noise, what it follows, what it never does."""

import json
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.cost_law import ENOUGH, CostLaw
from service.scheduling.latency import MAX_ACTIVE, LatencyModel
from service.scheduling.non_negative import NUM_SUMS, products, solve
from service.scheduling.work import Phase, Work, decode_work, encode_work, prefill_work

# Seconds for a run, a token and an attended position: a model of 135 M parameters on two cores, about.
LAWS: dict[Phase, tuple[float, float, float]] = {
    "encode": (2e-3, 8e-5, 3e-8),
    "prefill": (4e-3, 3e-4, 1e-7),
    "decode": (9e-3, 1.5e-3, 9e-7),
}
PHASES = sorted(LAWS)
Noise = Callable[[random.Random], float]


def draw(phase: Phase, numbers: random.Random) -> Work:
    """Draw work as traffic brings it: few rows more often than many, short more often than long."""
    if phase == "encode":
        return encode_work(min(64, int(numbers.expovariate(1 / 8)) + 1), numbers.randint(4, 512))
    if phase == "prefill":
        return prefill_work(256 * numbers.randrange(8), numbers.randint(2, 512))
    rows = min(32, int(numbers.expovariate(1 / 8)) + 1)
    return decode_work([min(4000, int(numbers.lognormvariate(6, 1)) + 1) for _ in range(rows)])


def cost(law: tuple[float, float, float], work: Work) -> float:
    return sum(coefficient * amount for coefficient, amount in zip(law, work, strict=True))


def quiet(numbers: random.Random) -> float:
    return numbers.lognormvariate(0, 0.05)


def shared(numbers: random.Random) -> float:
    """A machine on which one run in ten takes five times as long."""
    return quiet(numbers) * (5.0 if numbers.random() < 0.1 else 1.0)


def teach(
    model: LatencyModel, phase: Phase, law: tuple[float, float, float], count: int, noise: Noise, seed: int = 0
) -> None:
    numbers = random.Random(seed)
    for _ in range(count):
        work = draw(phase, numbers)
        assert model.observe(phase, work, cost(law, work) * noise(numbers))


def worst_error(model: LatencyModel, phase: Phase, law: tuple[float, float, float]) -> float:
    """Return the largest relative error over work of all sizes that was not learned from."""
    numbers = random.Random("fresh")
    return max(
        abs(model.predict(phase, work) / cost(law, work) - 1) for work in (draw(phase, numbers) for _ in range(300))
    )


@pytest.mark.parametrize("phase", PHASES)
def test_a_cost_law_is_recovered_without_noise(phase: Phase) -> None:
    model = LatencyModel()
    teach(model, phase, LAWS[phase], 40, lambda numbers: 1.0)
    assert model.coefficients(phase) == pytest.approx(LAWS[phase], rel=1e-2)
    assert worst_error(model, phase, LAWS[phase]) < 1e-3


@pytest.mark.parametrize("noise, bound", [(quiet, 0.04), (shared, 0.08)])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("seed", range(5))
def test_a_cost_law_is_recovered_through_noise_and_stolen_cores(
    phase: Phase, noise: Noise, bound: float, seed: int
) -> None:
    model = LatencyModel()
    teach(model, phase, LAWS[phase], 600, noise, seed)
    assert worst_error(model, phase, LAWS[phase]) < bound
    # An error is taken over noisy runs, so it tells of the noise as well.
    assert model.error(phase) < 0.1


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("factor", [0.3, 0.7, 1.5, 4.0])
def test_another_speed_is_followed_within_some_hundred_runs(phase: Phase, factor: float) -> None:
    model = LatencyModel()
    teach(model, phase, LAWS[phase], 3000, shared, seed=1)
    changed = tuple(factor * coefficient for coefficient in LAWS[phase])
    teach(model, phase, changed, 300, shared, seed=2)
    assert worst_error(model, phase, changed) < 0.12


@pytest.mark.parametrize("term", range(3))
def test_a_single_cost_that_changes_is_followed_too(term: int) -> None:
    model = LatencyModel()
    teach(model, "decode", LAWS["decode"], 3000, quiet, seed=1)
    changed = tuple(3 * c if index == term else c for index, c in enumerate(LAWS["decode"]))
    teach(model, "decode", changed, 800, quiet, seed=2)
    assert worst_error(model, "decode", changed) < 0.15


def test_a_core_that_is_stolen_for_a_while_leaves_nothing_behind() -> None:
    model = LatencyModel()
    teach(model, "decode", LAWS["decode"], 1000, quiet, seed=1)
    for seed in range(5):
        teach(model, "decode", LAWS["decode"], 40, lambda numbers: 2 * quiet(numbers), seed)
        teach(model, "decode", LAWS["decode"], 40, quiet, seed)
    assert worst_error(model, "decode", LAWS["decode"]) < 0.1


def test_what_has_not_happened_for_long_is_not_forgotten() -> None:
    model = LatencyModel()
    teach(model, "decode", LAWS["decode"], 1000, quiet, seed=1)
    numbers = random.Random(2)
    for step in range(5000):
        work = decode_work([100 + step % 20])
        model.observe("decode", work, cost(LAWS["decode"], work) * quiet(numbers))
    assert worst_error(model, "decode", LAWS["decode"]) < 0.15


def test_traffic_of_one_shape_is_predicted_though_it_does_not_tell_the_costs_apart() -> None:
    model = LatencyModel()
    work = decode_work([200] * 4)
    for _ in range(200):
        model.observe("decode", work, 0.02)
    assert model.predict("decode", work) == pytest.approx(0.02, rel=1e-3)
    assert 0 < model.predict("decode", decode_work([200])) < 0.02
    assert 0.02 < model.predict("decode", decode_work([200] * 8)) < 0.04


def test_a_first_run_that_warms_up_does_not_stay() -> None:
    model = LatencyModel()
    model.observe("decode", decode_work([5]), 3.0)
    teach(model, "decode", LAWS["decode"], 100, quiet)
    assert worst_error(model, "decode", LAWS["decode"]) < 0.1


amounts = st.floats(0, 1e9)
seconds = st.floats(1e-7, 1e4)
works = st.builds(Work, st.floats(1, 100), st.floats(1, 1e6), amounts)


@settings(max_examples=200)
@given(st.lists(st.tuples(works, seconds), min_size=ENOUGH, max_size=40), works, st.tuples(amounts, amounts, amounts))
def test_whatever_was_observed_more_work_never_takes_less(
    observed: list[tuple[Work, float]], work: Work, more: tuple[float, float, float]
) -> None:
    model = LatencyModel()
    for done, took in observed:
        assert model.observe("prefill", done, took)
    coefficients = model.coefficients("prefill")
    assert coefficients is not None
    assert all(0.0 <= coefficient < float("inf") for coefficient in coefficients)
    larger = Work(*(amount + extra for amount, extra in zip(work, more, strict=True)))
    assert 0.0 <= model.predict("prefill", work) <= model.predict("prefill", larger)
    assert model.error("prefill") is None or model.error("prefill") >= 0.0


observations = st.tuples(st.tuples(*[st.floats(0.01, 100)] * 3), st.floats(0.01, 100))


@settings(max_examples=200)
@given(st.lists(observations, min_size=1, max_size=12))
def test_no_other_non_negative_coefficients_fit_better(
    data: list[tuple[tuple[float, float, float], float]],
) -> None:
    sums = [sum(column) for column in zip(*(products(features, y, 1.0) for features, y in data), strict=True)]

    def squared_error(coefficients: tuple[float, ...]) -> float:
        return sum((sum(c * f for c, f in zip(coefficients, features, strict=True)) - y) ** 2 for features, y in data)

    found = solve(sums)
    assert min(found) >= 0.0
    slack = 1e-5 * sum(y * y for _, y in data)  # what the ridge may cost
    numbers = random.Random(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            other = tuple(
                max(0.0, c * numbers.uniform(1 - size, 1 + size) + size * numbers.gauss(0, 0.1)) for c in found
            )
            assert squared_error(found) <= squared_error(other) + slack


@pytest.mark.parametrize("took", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(took: float) -> None:
    model = LatencyModel()
    assert not model.observe("decode", decode_work([1]), took)
    assert model.observations("decode") == 0


@pytest.mark.parametrize("work", [Work(0, 1, 1), Work(1, 0, 1), Work(1, 1, -1), Work(1, float("nan"), 1)])
def test_work_that_cannot_be_is_refused(work: Work) -> None:
    model = LatencyModel()
    assert not model.observe("decode", work, 1.0)
    assert model.observations("decode") == 0


def test_nothing_is_predicted_before_enough_was_observed() -> None:
    model = LatencyModel()
    for count in range(1, ENOUGH + 1):
        assert model.predict("decode", decode_work([9])) is None
        assert model.coefficients("decode") is None
        model.observe("decode", decode_work([count]), 0.01)
    assert model.predict("decode", decode_work([9])) == pytest.approx(0.01, rel=0.01)
    assert model.error("decode") is None
    assert model.predict("prefill", decode_work([9])) is None


def test_a_run_is_predicted_before_it_is_learned_from() -> None:
    model = LatencyModel()
    for _ in range(ENOUGH):
        model.observe("decode", decode_work([9]), 0.01)
    model.observe("decode", decode_work([9]), 0.02)
    assert model.error("decode") == pytest.approx(0.5)


def test_every_number_of_active_bundles_has_a_law_and_the_nearest_stands_in() -> None:
    model = LatencyModel()
    work = decode_work([50])
    for active, took in ((1, 0.01), (3, 0.03)):
        for _ in range(ENOUGH):
            model.observe("decode", work, took, active)
    found = {active: model.predict("decode", work, active) for active in range(1, 10)}
    expected = {1: 0.01, **dict.fromkeys(range(2, 10), 0.03)}
    assert found == pytest.approx(expected, rel=1e-3)
    for _ in range(ENOUGH):
        model.observe("decode", work, 0.05, 17)
    assert model.predict("decode", work, MAX_ACTIVE) == pytest.approx(0.05, rel=1e-3)
    assert model.observations("decode") == 3 * ENOUGH


def test_what_was_learned_survives_json() -> None:
    model = LatencyModel()
    for phase in PHASES:
        teach(model, phase, LAWS[phase], 100, quiet)
    model.observe("decode", decode_work([1]), 1.0, active=2)
    again = LatencyModel()
    again.restore(json.loads(json.dumps(model.to_dict())))
    for phase in PHASES:
        assert again.observations(phase) == model.observations(phase)
        teach(model, phase, LAWS[phase], 1, quiet, seed=9)
        teach(again, phase, LAWS[phase], 1, quiet, seed=9)
        assert worst_error(again, phase, LAWS[phase]) < 0.1
    assert again.to_dict()["decode"]["2"] == model.to_dict()["decode"]["2"]


SUMS = [[1.0] * NUM_SUMS] * 2


@pytest.mark.parametrize(
    "state",
    [
        {"dream": {}},
        {"decode": 3},
        {"decode": {"0": {"observations": 1, "sums": SUMS}}},
        {"decode": {"5": {"observations": 1, "sums": SUMS}}},
        {"decode": {"1": 3}},
        {"decode": {"1": {}}},
        {"decode": {"1": {"observations": -1, "sums": SUMS}}},
        {"decode": {"1": {"observations": True, "sums": SUMS}}},
        {"decode": {"1": {"observations": "many", "sums": SUMS}}},
        {"decode": {"1": {"observations": 9, "sums": SUMS[:1]}}},
        {"decode": {"1": {"observations": 9, "sums": [[1.0], [1.0]]}}},
        {"decode": {"1": {"observations": 9, "sums": [[-1.0] * NUM_SUMS] * 2}}},
        {"decode": {"1": {"observations": 9, "sums": [[float("nan")] * NUM_SUMS] * 2}}},
        {"decode": {"1": {"observations": 9, "sums": ["123456789"] * 2}}},
    ],
)
def test_anything_else_is_refused_and_changes_nothing(state: dict[str, object]) -> None:
    model = LatencyModel()
    teach(model, "decode", LAWS["decode"], 20, quiet)
    before = model.to_dict()
    with pytest.raises(ValueError):
        model.restore(state)
    assert model.to_dict() == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["1", "2", "x"]), json_values))
def test_no_file_makes_it_fail_otherwise(laws: dict[str, object]) -> None:
    model = LatencyModel()
    try:
        model.restore({"decode": laws})
    except ValueError:
        assert model.observations("decode") == 0


@settings(max_examples=100)
@given(st.lists(st.lists(st.floats(0, allow_infinity=False), min_size=9, max_size=9), min_size=2, max_size=2))
def test_sums_that_no_data_has_still_make_a_law_or_none(sums: list[list[float]]) -> None:
    try:
        law = CostLaw.from_dict({"observations": 100, "sums": sums})
    except ValueError:
        return
    assert law.coefficients is not None
    assert all(0.0 <= c < float("inf") for c in law.coefficients)
