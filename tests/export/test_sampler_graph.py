"""The sampler graphs in ONNX Runtime: against definitions in float64, at the edges, row by row."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from attendant.bundle import NOT_FINITE, NOT_RANKED
from export.cuda_kernels import nodes_without_kernel
from export.sampler import sampler_graphs
from export.sampler_check import sampler_checks
from export.sampler_graph import CANDIDATES, LogprobsGraph, SamplerGraph

V = 5003
BELOW_ONE = 1 - 2.0**-53
Choose = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def sessions(sampler_directory: Path) -> dict[str, ort.InferenceSession]:
    return {
        graph.kind.value: ort.InferenceSession(sampler_directory / graph.file, providers=["CPUExecutionProvider"])
        for graph in sampler_graphs(V)
    }


def inputs(logits: np.ndarray, **given: object) -> dict[str, np.ndarray]:
    """What the filtered graph takes, [B] or [B, 1] of each: without adjustments, unless given."""
    rows = len(logits)

    def each(name: str, neutral: float, dtype: type) -> np.ndarray:
        return np.array(np.broadcast_to(np.asarray(given.get(name, neutral), dtype), rows))

    return {
        "logits": logits.astype(np.float32),
        "inverse_temperature": each("inverse_temperature", 1, np.float32),
        "uniform": each("uniform", 0, np.float64),
        "top_k": each("top_k", 0, np.int64),
        "top_p": each("top_p", 1, np.float64),
        "min_p": each("min_p", 0, np.float32),
        "adjusted_ids": np.asarray(given.get("adjusted_ids", np.zeros((rows, 1))), np.int64),
        "repetition": np.asarray(given.get("repetition", np.ones((rows, 1))), np.float32),
        "penalty": np.asarray(given.get("penalty", np.zeros((rows, 1))), np.float32),
        "bias": np.asarray(given.get("bias", np.zeros((rows, 1))), np.float32),
    }


@pytest.fixture(scope="module")
def choose(sessions: dict[str, ort.InferenceSession]) -> Choose:
    def run(logits: np.ndarray, *, kind: str = "sample_filtered", **given: object) -> np.ndarray:
        session, feed = sessions[kind], inputs(logits, **given)
        return session.run(None, {node.name: feed[node.name] for node in session.get_inputs()})[0]

    return run


def random_rows(seed: int, count: int) -> np.ndarray:
    """Rows of every kind: flat and peaked, with ties, with forbidden tokens, far from zero."""
    numbers = np.random.default_rng(seed)
    rows = numbers.standard_normal((count, V)) * numbers.choice([0.01, 1, 4, 30], (count, 1))
    rows[::5] = np.round(rows[::5])
    rows[1::5][numbers.random((len(rows[1::5]), V)) < 0.7] = -np.inf
    rows[2::5] += 1e4
    return rows.astype(np.float32)


def ranked(row: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, the most likely first and of equals the lower, and their weights in units of the highest."""
    ids = np.lexsort((np.arange(V), -row))
    return ids, np.exp((row[ids].astype(np.float64) - float(row[ids[0]])) / temperature)


def test_what_passes_the_filters_and_where_each_token_lies_is_as_defined(choose: Choose) -> None:
    numbers = np.random.default_rng(3)
    for seed in range(12):
        temperature = float(numbers.choice([0.3, 1.0, 4.0]))
        row = (numbers.standard_normal(V) * 3).astype(np.float32)
        ids, weights = ranked(row, temperature)
        cumulative = weights.cumsum()
        wanted = int(numbers.integers(1, min(200, (weights > 1e-4 * cumulative[-1]).sum())))
        # Thresholds in the middle between two tokens, where rounding does not matter.
        top_p = float((cumulative[wanted - 1] - weights[wanted - 1] / 2) / cumulative[-1])
        min_p = float(np.sqrt(weights[wanted - 1] * weights[wanted]))
        for filters in ({"top_k": wanted}, {"top_p": top_p}, {"min_p": min_p}):
            middles = (cumulative[:wanted] - weights[:wanted] / 2) / cumulative[wanted - 1]
            uniform = np.concatenate((middles, [0.0, BELOW_ONE]))
            rows = np.broadcast_to(row, (len(uniform), V))
            chosen = choose(rows, inverse_temperature=1 / temperature, uniform=uniform, **filters)
            assert chosen.tolist() == [*ids[:wanted], ids[0], ids[wanted - 1]], (seed, filters)


def test_the_share_of_top_p_is_one_of_what_top_k_leaves(choose: Choose) -> None:
    row = np.full(V, -1.0, np.float32)
    row[[7, 8, 9, 10]] = 0.0
    chosen = choose(row[None].repeat(2, 0), top_k=4, top_p=[0.5, 0.51], uniform=BELOW_ONE)
    assert chosen.tolist() == [8, 9]


def test_without_filters_the_sum_runs_in_the_order_of_the_vocabulary(choose: Choose) -> None:
    rows = random_rows(4, 40)
    scaled = (rows.astype(np.float64) - rows.max(1, keepdims=True)) / 0.7
    cumulative = np.exp(scaled).cumsum(1)
    uniform = np.random.default_rng(5).random(len(rows))
    expected = (cumulative <= (uniform * cumulative[:, -1])[:, None]).sum(1)
    for kind in ("sample", "sample_filtered"):
        chosen = choose(rows, kind=kind, inverse_temperature=1 / 0.7, uniform=uniform)
        apart = np.abs(cumulative[np.arange(len(rows)), chosen] / cumulative[:, -1] - uniform)
        assert ((chosen == expected) | (apart < 1e-5)).all()
        assert (chosen == expected).mean() > 0.9


@pytest.mark.parametrize("kind", ["sample", "sample_filtered"])
def test_no_number_chooses_what_has_no_weight(choose: Choose, kind: str) -> None:
    numbers = np.random.default_rng(6)
    for possible in ([0], [V - 1], [255], [256], [4999, 5002], sorted(numbers.choice(V, 300, replace=False))):
        row = np.full(V, -np.inf, np.float32)
        row[possible] = numbers.standard_normal(len(possible)) * 20
        uniform = np.concatenate(([0.0, np.nextafter(0, 1), BELOW_ONE], numbers.random(20)))
        weight = np.exp((row - row.max()).astype(np.float32))
        chosen = choose(row[None].repeat(len(uniform), 0), kind=kind, uniform=uniform)
        assert (weight[chosen] > 0).all()
        assert chosen[0] == np.flatnonzero(weight)[0] and chosen[2] == np.flatnonzero(weight)[-1]


def test_draws_with_filters_follow_the_distribution(choose: Choose) -> None:
    row = np.full(V, -20.0, np.float32)
    row[[5, 300, 301, 2500, 5002, 77, 78]] = [2.0, 1.5, 1.5, 1.0, 0.0, -0.5, -4.0]
    ids, weights = ranked(row, 1.3)
    kept = int((weights[:6].cumsum() < 0.97 * weights[:6].sum()).sum()) + 1
    shares = weights[:kept] / weights[:kept].sum()
    uniform = np.random.default_rng(7).random(6000)
    chosen = np.concatenate(
        [
            choose(row[None].repeat(500, 0), inverse_temperature=1 / 1.3, top_k=6, top_p=0.97, min_p=0.01, uniform=part)
            for part in uniform.reshape(-1, 500)
        ]
    )
    counts = np.array([(chosen == token).sum() for token in ids[:kept]])
    assert kept > 4 and counts.sum() == len(uniform)
    chi2 = ((counts - shares * len(uniform)) ** 2 / (shares * len(uniform))).sum()
    assert chi2 < 20.5  # 99.9 % of 5 degrees of freedom


def test_greedy_takes_the_first_of_the_highest(choose: Choose) -> None:
    rows = random_rows(8, 20)
    rows[0] = 0
    rows[1] = -1e30
    rows[2, [4000, 511, 512]] = rows[2].max() + 1
    for kind in ("sample", "sample_filtered"):
        assert choose(rows, kind=kind, inverse_temperature=0, top_k=3).tolist() == rows.argmax(1).tolist()


def test_adjustments_change_logits_in_the_order_of_their_definition(choose: Choose) -> None:
    rows = np.zeros((4, V), np.float32)
    rows[:, 10], rows[:, 20], rows[:, 30] = 3.0, 2.9, -1.0
    neutral = np.zeros((4, 4))
    ids = np.array([[10, 20, 30, 10]] * 4)
    repetition = np.ones((4, 4))
    repetition[0, [0, 3]] = 2.0  # 3 / 2 < 2.9
    penalty, bias = neutral.copy(), neutral.copy()
    penalty[1, [0, 3]] = 0.2
    bias[2, [0, 3]] = -np.inf
    repetition[3, :] = [1, 1, 0.01, 1]  # -1 * 0.01 - (-4), which divided would be -100 + 4
    penalty[3, 2] = -4.0
    chosen = choose(rows, inverse_temperature=0, adjusted_ids=ids, repetition=repetition, penalty=penalty, bias=bias)
    assert chosen.tolist() == [20, 20, 20, 30]


@pytest.mark.parametrize("kind", ["sample", "sample_filtered"])
def test_a_row_alone_gives_what_it_gives_among_others(choose: Choose, kind: str) -> None:
    rows = random_rows(9, 30)
    uniform = np.random.default_rng(10).random(len(rows))
    filters = {"top_k": 50, "top_p": 0.9, "inverse_temperature": 1.5}
    together = choose(rows, kind=kind, uniform=uniform, **filters)
    alone = [choose(rows[i : i + 1], kind=kind, uniform=uniform[i : i + 1], **filters)[0] for i in range(len(rows))]
    assert together.tolist() == alone


@pytest.mark.parametrize("kind", ["sample", "sample_filtered"])
def test_rows_that_are_not_finite_say_so_and_touch_no_neighbour(choose: Choose, kind: str) -> None:
    rows = random_rows(11, 7)
    expected = choose(rows, kind=kind, uniform=0.4, top_k=5)
    broken = rows.copy()
    broken[1, 17], broken[3, V - 1], broken[5] = np.nan, np.inf, -np.inf
    for given in ({}, {"inverse_temperature": [1, 0, 1, 0, 1, 0, 1]}):
        chosen = choose(broken, kind=kind, uniform=0.4, top_k=5, **given)
        assert chosen[1::2].tolist() == [NOT_FINITE] * 3
        assert chosen[::2].tolist() == expected[::2].tolist()


def test_a_forbidden_token_that_is_not_finite_is_no_excuse(choose: Choose) -> None:
    rows = np.zeros((2, V), np.float32)
    rows[0, 4], rows[1, 4] = np.nan, np.inf
    assert (choose(rows, adjusted_ids=[[4]] * 2, bias=[[-np.inf]] * 2) == NOT_FINITE).all()


def test_a_draw_behind_the_ranked_is_left_to_the_host_and_no_other(choose: Choose) -> None:
    row = np.zeros((1, V), np.float32)  # equals rank in the order of the vocabulary
    cases = [
        ({"top_k": CANDIDATES}, 0.9, int(0.9 * CANDIDATES)),
        ({"top_k": CANDIDATES + 1}, 0.9, NOT_RANKED),  # 921.6 or 922.5
        ({"top_k": CANDIDATES + 1}, 0.5, 512),  # 512 or 512.5
        ({"top_p": 0.9}, 0.9, NOT_RANKED),
        ({"top_p": 0.9}, 0.1, int(0.09 * V)),
        ({"top_p": 0.1}, 0.99, int(0.99 * (int(0.1 * V) + 1))),
        ({"top_p": 0.1, "top_k": V - 1}, 0.5, NOT_RANKED),  # the sum of what top_k leaves is not known
        ({"top_p": 0.1, "top_k": V - 1}, 0.0, 0),
        ({"min_p": 0.5}, 0.3, NOT_RANKED),
        ({"min_p": 0.5}, 0.0, 0),
        ({"min_p": 0.5, "top_k": 40}, 0.9, 36),
        ({"min_p": 0.5, "top_p": 0.1}, 0.9, int(0.9 * (int(0.1 * V) + 1))),
    ]
    for filters, uniform, rank in cases:
        chosen = choose(row, uniform=uniform, **filters)[0]
        assert chosen == rank, (filters, uniform)


@pytest.mark.parametrize("vocab_size", [3, 300, 4000])
def test_the_module_in_pytorch_computes_the_same_for_any_vocabulary(vocab_size: int) -> None:
    numbers = np.random.default_rng(vocab_size)
    rows = (numbers.standard_normal((12, vocab_size)) * 2).astype(np.float32)
    given = inputs(rows, top_k=min(20, vocab_size - 1), top_p=0.8, min_p=0.02, uniform=numbers.random(12))
    tensors = {name: torch.from_numpy(array) for name, array in given.items()}
    few, all_ranked = SamplerGraph(vocab_size, 40)(**tensors), SamplerGraph(vocab_size, vocab_size)(**tensors)
    assert few.tolist() == all_ranked.tolist()
    assert min(few.tolist()) >= 0


def test_the_graph_is_the_module(choose: Choose) -> None:
    rows = np.random.default_rng(12).standard_normal((25, V)) * 3  # among equals PyTorch has an order of its own
    wanted = {"top_k": 30, "top_p": 0.9, "uniform": np.random.default_rng(13).random(25), "inverse_temperature": 0.8}
    tensors = {name: torch.from_numpy(array) for name, array in inputs(rows, **wanted).items()}
    assert SamplerGraph(V)(**tensors).tolist() == choose(rows, **wanted).tolist()


def test_every_check_of_the_certificate_passes(sampler_directory: Path) -> None:
    assert [check for check in sampler_checks(sampler_directory, sampler_graphs(V)) if not check.passed] == []


@pytest.mark.parametrize(
    ("kind", "operator", "wrong"),
    [("sample", "Exp", "Sigmoid"), ("sample_filtered", "ReduceMin", "ReduceMax"), ("logprobs", "Log", "Sqrt")],
)
def test_a_wrong_operator_fails_the_certificate(
    sampler_directory: Path, tmp_path: Path, kind: str, operator: str, wrong: str
) -> None:
    shutil.copytree(sampler_directory, tmp_path, dirs_exist_ok=True)
    model = onnx.load(tmp_path / f"{kind}.onnx")
    for node in model.graph.node:
        node.op_type = wrong if node.op_type == operator else node.op_type
    onnx.save(model, tmp_path / f"{kind}.onnx")
    assert not all(check.passed for check in sampler_checks(tmp_path, sampler_graphs(V)))


def test_operators_that_cuda_has_in_older_versions_only_are_found(sampler_directory: Path) -> None:
    model = ir.load(sampler_directory / "sample.onnx")
    assert nodes_without_kernel(model.graph) == []
    model.graph.opset_imports[""] = 23
    assert set(nodes_without_kernel(model.graph)) == {
        f"{name} of opset 23" for name in ("Pad", "ReduceMax", "ReduceMin")
    }


def test_log_probabilities_are_those_of_the_logits(sessions: dict[str, ort.InferenceSession]) -> None:
    rows = random_rows(14, 20)
    choices = np.random.default_rng(15).integers(0, V, len(rows))
    logprobs, top_ids, top = sessions["logprobs"].run(None, {"logits": rows, "choices": choices})
    exact = rows.astype(np.float64) - rows.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    each = np.arange(len(rows))
    assert np.allclose(logprobs, exact[each, choices], rtol=1e-6, atol=2e-6)
    order = np.stack([np.lexsort((np.arange(V), -row))[: top.shape[1]] for row in rows])
    assert np.array_equal(top_ids, order)
    assert np.allclose(top, exact[each[:, None], order], rtol=1e-6, atol=2e-6)
    alone = sessions["logprobs"].run(None, {"logits": rows[6:7], "choices": choices[6:7]})
    assert all(np.array_equal(one[0], many[6]) for one, many in zip(alone, (logprobs, top_ids, top), strict=True))
    assert LogprobsGraph(30).num_top == 30
