"""What a bundle must show where it runs: the same bits on a CPU, logits within a tolerance on a device.

A device's rounding is played on the CPU: the same graphs, whose logits are then moved by what depends on the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from service.bundle import BundleRefused, FoundBundle
from service.engine.agreement import Agreement, relative_error
from service.engine.device import HostDevice
from service.engine.device_graph import DeviceGraph, DownloadedGraph
from service.engine.probe import EngineBroken, generation_probe
from service.engine.runtime import use_threads
from service.engine.self_test import check_bundle
from service.engine.step_graph import StepGraph

BOUND = 0.02
SLOTS, CAPACITY = 8, 288


class RoundingGraph(StepGraph):
    """Rounds as a device might: every run of another shape moves each row's logits by up to a share of the largest."""

    share = 0.0

    def decode(self, token_ids: Sequence[int], *arguments: object) -> np.ndarray:
        return self._rounded(super().decode(token_ids, *arguments), (len(token_ids), 1))

    def chunk(self, slot: int, token_ids: Sequence[int], start: int, **options: bool) -> np.ndarray:
        return self._rounded(super().chunk(slot, token_ids, start, **options), (1, len(token_ids), start))

    def prompts(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return self._rounded(super().prompts(first_slot, prompts), (len(prompts), len(prompts[-1])))

    def _rounded(self, logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        moves = np.random.default_rng(shape).uniform(-self.share, self.share, logits.shape)
        return (logits + np.abs(logits).max(axis=1, keepdims=True) * moves).astype(np.float32)


@pytest.fixture
def on_device(tiny_bundles: dict[str, FoundBundle]) -> FoundBundle:
    """The fp32 bundle, to be judged as one for a device is."""
    found = tiny_bundles["fp32"]
    golden = found.manifest.golden.model_copy(update={"bound": BOUND, "log_likelihood_bound": 0.05})
    update = {"target": "cuda", "precision": "fp16", "golden": golden}
    return replace(found, manifest=found.manifest.model_copy(update=update))


@pytest.fixture
def make(tiny_bundles: dict[str, FoundBundle]) -> Callable[..., RoundingGraph]:
    def make(share: float, kind: type[RoundingGraph] = RoundingGraph) -> RoundingGraph:
        use_threads(2)
        graph = kind(tiny_bundles["fp32"], SLOTS, CAPACITY)
        graph.share = share
        return graph

    return make


def test_on_a_cpu_every_bit_counts(tiny_bundles: dict[str, FoundBundle], make) -> None:
    checks = check_bundle(tiny_bundles["fp32"], make(0.0))
    invariance = [check for check in checks if "golden" not in check.name]
    assert len(invariance) == 6
    assert {(check.measured, check.bound) for check in invariance} == {(0.0, 0.0)}
    assert all(check.name.startswith("bits that differ between ") for check in invariance)
    with pytest.raises(BundleRefused, match="bits that differ between one pass and chunks"):
        check_bundle(tiny_bundles["fp32"], make(1e-6))


def test_on_a_device_the_tolerance_of_the_golden_run_holds_for_every_logit(on_device: FoundBundle, make) -> None:
    """The same moves as a CPU is refused for."""
    checks = check_bundle(on_device, make(BOUND / 4))
    logits = [check for check in checks if "likelihood" not in check.name]
    assert len(logits) == 8 and {check.bound for check in logits} == {BOUND}
    assert all(BOUND / 10 < check.measured <= BOUND for check in logits if "copy" not in check.name)
    assert [check.name for check in logits if "golden" not in check.name] == [
        "difference between one pass and chunks",
        "difference between a prompt alone and among others",
        "difference between a prompt and its copy",
        *["difference between a row alone and among others"] * 3,
    ]


def test_a_graph_on_a_device_passes_the_checks_of_a_device_and_those_of_a_cpu(
    on_device: FoundBundle, tiny_bundles: dict[str, FoundBundle]
) -> None:
    """The host's memory is the device here, so even its bits are the CPU's."""
    use_threads(2)
    graph = DownloadedGraph(DeviceGraph(tiny_bundles["fp32"], SLOTS, CAPACITY, HostDevice(), buckets=(1, 2, 4, 8)))
    for found in (on_device, tiny_bundles["fp32"]):
        checks = check_bundle(found, graph)
        assert len(checks) == 9 and max(check.measured for check in checks) < 1e-5
    generation_probe(on_device, graph).check(SLOTS - 1)


def test_on_a_device_the_golden_run_decides(on_device: FoundBundle, make) -> None:
    with pytest.raises(BundleRefused, match=r"golden replay: 0\.0\d+, allowed 0\.02 \(prompt of"):
        check_bundle(on_device, make(3 * BOUND))
    golden = on_device.manifest.golden.model_copy(update={"log_likelihood_bound": 1e-9})
    strict = replace(on_device, manifest=on_device.manifest.model_copy(update={"golden": golden}))
    with pytest.raises(BundleRefused, match="golden text log-likelihood"):
        check_bundle(strict, make(BOUND / 4))


class WrongCopy(RoundingGraph):
    """Copies the beginning only."""

    def copy(self, source: int, destination: int, length: int) -> None:
        super().copy(source, destination, length)
        for pool in self.pools:
            pool.array[destination][:, length // 8 :] = 0


class WrongRow(RoundingGraph):
    """Gives a row of a batch the token of its neighbour."""

    def decode(self, token_ids: Sequence[int], *arguments: object) -> np.ndarray:
        lengths = arguments[0]
        if len(token_ids) > 4:
            token_ids = [*token_ids[1:], token_ids[0]]
        return super().decode(token_ids, lengths, *arguments[1:])


class Silent(RoundingGraph):
    """Writes no logits."""

    def _rounded(self, logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros_like(logits)


@pytest.mark.parametrize(
    ("fault", "check"),
    [(WrongCopy, "a prompt and its copy"), (WrongRow, "golden replay|row alone"), (Silent, "golden")],
)
def test_a_fault_is_no_rounding(fault: type[RoundingGraph], check: str, on_device: FoundBundle, make) -> None:
    with pytest.raises(BundleRefused, match=check):
        check_bundle(on_device, make(BOUND / 4, fault))


def test_what_is_not_finite_agrees_with_nothing() -> None:
    one = np.array([[1.0, 2.0]], np.float32)
    for other in (np.array([[1.0, np.nan]]), np.array([[np.inf, 2.0]]), np.zeros((1, 2))):
        assert relative_error(one, other) == float("inf")
        assert not Agreement(0.5).check("both", [(one, other)], "").passed
        assert not Agreement(0.0).check("both", [(one, other)], "").passed


def test_a_probe_on_a_device_allows_what_rounding_does_and_no_more(on_device: FoundBundle, make) -> None:
    graph = make(0.0)
    probe = generation_probe(on_device, graph)
    graph.share = BOUND / 2
    probe.check(3)
    graph.share = 10 * BOUND
    with pytest.raises(EngineBroken, match=r"otherwise than when it was loaded: difference between .* allowed 0\.02"):
        probe.check(3)
