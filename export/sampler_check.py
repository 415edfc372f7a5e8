"""The sampler's part of a certificate: its graphs against the definitions in float64, and whether CUDA can take them.

Every threshold and every number lies in the middle between two tokens, where rounding decides nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from attendant.bundle import Check, GraphKind, GraphSpec, Role
from export import cuda_kernels

LOGPROB_BOUND = 1e-4
"""Error of a log-probability in nats, of rows whose logits reach 30."""
_NUM_ROWS = 16
_NUM_RANKED = 100  # at most, of a row

Array = NDArray[Any]


def sampler_checks(directory: Path, graphs: Sequence[GraphSpec]) -> Iterator[Check]:
    """Run the graphs on rows from flat to peaked and compare every choice and log-probability.

    Args:
        directory: the bundle.
        graphs: as `write_sampler` returns them.
    """
    by_kind = {graph.kind: graph for graph in graphs}
    sessions = {
        kind: ort.InferenceSession(directory / graph.file, providers=["CPUExecutionProvider"])
        for kind, graph in by_kind.items()
    }
    rows = _rows(by_kind[GraphKind.SAMPLE])
    grid = f"{_NUM_ROWS} rows of {rows.shape[1]} logits"
    ids = np.argsort(-rows, axis=1, kind="stable")
    for kind in (GraphKind.SAMPLE, GraphKind.SAMPLE_FILTERED):
        uniform, expected = _in_order(rows)
        greedy = _run(sessions[kind], rows, {Role.INVERSE_TEMPERATURE: 0})[0]
        drawn = _run(sessions[kind], rows, {Role.UNIFORM: uniform})[0]
        yield _none(f"{kind}: greedy choices other than the first of the highest", greedy != ids[:, 0], grid)
        yield _none(f"{kind}: draws other than the inverse of the cumulative sum", drawn != expected, grid)
        adjusted = _run(sessions[kind], rows, {Role.INVERSE_TEMPERATURE: 0} | _against(ids[:, 0]))[0]
        yield _none(f"{kind}: choices of what is forbidden or punished", adjusted != ids[:, 1], grid)
    for role in (Role.TOP_K, Role.TOP_P, Role.MIN_P):
        threshold, uniform, expected = _filtered(rows, ids, role)
        drawn = _run(sessions[GraphKind.SAMPLE_FILTERED], rows, {role: threshold, Role.UNIFORM: uniform})[0]
        yield _none(f"draws with {role} other than those of what passes", drawn != expected, grid)
    yield _logprobs(sessions[GraphKind.LOGPROBS], rows, ids)
    for graph in graphs:
        nodes = ir.load(directory / graph.file).graph
        found = cuda_kernels.nodes_without_kernel(nodes) + cuda_kernels.copies(nodes)
        about = "; ".join([f"{sum(1 for _ in nodes)} nodes", *found[:3]])
        yield _none(f"{graph.kind}: nodes that CUDA has no kernel for, values copied in a run", np.array(found), about)


def _rows(graph: GraphSpec) -> Array:
    """Return rows with ties among their highest, with forbidden tokens, and spreads from 0.01 to 10."""
    logits = graph.input(Role.LOGITS)
    assert logits is not None, "write_sampler declares them"
    numbers = np.random.default_rng(0)
    rows = numbers.standard_normal((_NUM_ROWS, int(logits.axes[1]))) * np.geomspace(0.01, 10, _NUM_ROWS)[:, None]
    rows[::4, -2:] = rows[::4].max(axis=1, keepdims=True)
    rows[1::4, ::3] = -np.inf
    return rows.astype(np.float32)


def _against(token_ids: Array) -> dict[Role, Array]:
    """Return adjustments that no token survives, a third of the rows each: a bias, a penalty, one of repetition."""
    third = np.arange(len(token_ids)) % 3
    return {
        Role.ADJUSTED_IDS: token_ids,
        Role.BIAS: np.where(third == 0, -np.inf, 0),
        Role.PENALTY: np.where(third == 1, 1e6, 0),
        Role.REPETITION: np.where(third == 2, 1e6, 1),
    }


def _in_order(rows: Array) -> tuple[Array, Array]:
    """Return a number for each row, and the token that it stands for in the order of the vocabulary."""
    weights = _weights(rows)
    expected = np.array([np.flatnonzero(row > row.max() / 10)[-1] for row in weights])
    cumulative = weights.cumsum(axis=1)
    each = np.arange(len(rows))
    return (cumulative[each, expected] - weights[each, expected] / 2) / cumulative[:, -1], expected


def _filtered(rows: Array, ids: Array, role: Role) -> tuple[Array, Array, Array]:
    """Return thresholds that some of the ranked tokens pass, numbers, and the tokens that these stand for."""
    weights = np.take_along_axis(_weights(rows), ids, axis=1)
    cumulative = weights.cumsum(axis=1)
    each = np.arange(len(rows))
    # The last that passes has weight enough to be told from its neighbours; not all that are equal need pass.
    likely = (weights > 1e-3 * weights.sum(axis=1, keepdims=True) / rows.shape[1]).sum(axis=1)
    distinct = weights[:, :-1] > weights[:, 1:] * (1 + 1e-5)
    kept = np.array(
        [
            1 + np.flatnonzero(steps[: min(_NUM_RANKED, count - 1)])[-1]
            for steps, count in zip(distinct, likely, strict=True)
        ]
    )
    last = weights[each, kept - 1]
    thresholds = {
        Role.TOP_K: kept,
        Role.TOP_P: (cumulative[each, kept - 1] - last / 2) / cumulative[:, -1],
        Role.MIN_P: np.sqrt(last * weights[each, kept]),
    }
    uniform = (cumulative[each, kept - 1] - last / 2) / cumulative[each, kept - 1]
    return thresholds[role], uniform, ids[each, kept - 1]


def _logprobs(session: ort.InferenceSession, rows: Array, ids: Array) -> Check:
    choices = ids[:, 0]
    chosen, top_ids, top = session.run(None, {Role.LOGITS.value: rows, Role.CHOICES.value: choices})
    exact = rows - rows.max(axis=1, keepdims=True).astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    known = np.take_along_axis(exact, top_ids, axis=1)
    with np.errstate(invalid="ignore"):  # of forbidden tokens, both are negative infinity
        apart = np.where(known == top, 0.0, np.abs(top - known))
    error = max(np.abs(chosen - exact[np.arange(len(rows)), choices]).max(), apart.max())
    misplaced = (top_ids != ids[:, : top_ids.shape[1]]).any()
    return Check(
        name="log-probabilities",
        measured=float("inf") if misplaced else float(error),
        bound=LOGPROB_BOUND,
        grid=f"{len(rows)} choices and the {top.shape[1]} most likely of {rows.shape[1]}",
    )


def _run(session: ort.InferenceSession, rows: Array, given: dict[Role, Array | int]) -> list[Array]:
    """Run a sample graph without adjustments at temperature 1, except for what is `given`."""
    neutral = {Role.INVERSE_TEMPERATURE: 1, Role.TOP_P: 1, Role.REPETITION: 1} | given
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}
    feed = {}
    for node in session.get_inputs():
        value = np.broadcast_to(neutral.get(Role(node.name), 0), len(rows)).astype(types[node.type])
        feed[node.name] = value if len(node.shape) == 1 else value[:, None]
    outputs: list[Array] = session.run(None, feed | {Role.LOGITS.value: rows})
    return outputs


def _weights(rows: Array) -> Array:
    return np.exp(rows - rows.max(axis=1, keepdims=True).astype(np.float64))


def _none(name: str, wrong: Array, grid: str) -> Check:
    return Check(name=name, measured=float(np.count_nonzero(wrong)), bound=0, grid=grid)
