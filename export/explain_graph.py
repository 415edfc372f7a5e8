"""The explain graph of a bundle: traced, written beside the served graphs, held against PyTorch, and recorded.

It is loaded when somebody asks for it and never before, so it may be slow but must not be large: tensors that lie in a
served graph's data file are read from there, and only what is found nowhere is stored again.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from attendant.bundle import Certificate, Check, DType, GraphKind, GraphSpec, Places, Role, TensorSpec, WeightsSpec
from export.certificate import PARITY_BOUND, run_checks
from export.errors import ExportRefused
from export.explain import Shown, shown_of
from export.onnx_export import trace
from export.parts import Parts, Report
from export.runner import NUM_THREADS

GRAPH_FILE = "explain.onnx"
OWN_BYTES = 256 << 20
"""Most bytes that an explain graph may add to a bundle without being asked for."""
_LARGEST_FILE = 2_000_000_000  # what a single ONNX file can hold
_SMALLEST_SHARED = 4096
_NEEDLE = 64
_LENGTHS = (1, 2, 17, 64, 191)
_GOLDEN_LENGTH = 8

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor's bytes lie."""

    file: str
    offset: int


class _Traced(nn.Module):
    """The forward of what is shown, as a module whose parameters the exporter finds."""

    def __init__(self, model: nn.Module, shown: Shown) -> None:
        super().__init__()
        self.model = model
        self.shown = shown

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.shown.forward(*inputs))


def add_explain_graph(directory: Path, model: nn.Module, parts: Parts, asked: bool | None, report: Report) -> Parts:
    """Write the explain graph of a bundle in the making, and return its parts with that.

    Args:
        directory: where graphs and golden run of `parts` lie.
        model: what was exported.
        parts: what the bundle has so far.
        asked: whether the graph must be there; None adds it where the model has weights to show and it takes at most
            `OWN_BYTES` more.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: a graph that was asked for cannot be made, or a check failed.
    """
    shown = shown_of(model, parts.limits.max_model_len)
    if shown is None:
        return _without(parts, "the model computes no attention weights that can be exported", asked, report)
    shared = _find(model, [directory / graph.data for graph in parts.graphs if graph.data is not None])
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    own = sum(size for address, size in tensors.items() if address not in shared)
    if own > (_LARGEST_FILE if asked else OWN_BYTES):
        more = "" if asked else "; --explain adds it"
        return _without(parts, f"it would add {own / 1e6:.0f} MB to the bundle{more}", asked, report)
    report(f"tracing the explain graph, which adds {own / 1e6:.1f} MB")
    traced = _Traced(model, shown).eval()
    try:
        outputs = _write(directory, traced, shown, shared)
    except Exception as error:  # of any kind: the model may be a stranger's, who need not have thought of weights
        reason = str(error).partition("\n")[0]
        return _without(parts, f"its weights cannot be traced ({type(error).__name__}: {reason})", asked, report)
    report("checking the explain graph against the model")
    session = _session(directory / GRAPH_FILE)
    checks = run_checks(_checks(session, traced, shown), report)
    _record(directory / parts.golden.file, session, shown)
    graph = GraphSpec(
        kind=GraphKind.EXPLAIN,
        file=GRAPH_FILE,
        data=next((place.file for place in shared.values()), None),
        inputs=shown.inputs,
        outputs=outputs,
    )
    return replace(
        parts,
        tasks=(*parts.tasks, "explain"),
        graphs=(*parts.graphs, graph),
        certificate=Certificate(checks=(*parts.certificate.checks, *checks), quality=parts.certificate.quality),
        explain=shown.explain,
    )


def _without(parts: Parts, why: str, asked: bool | None, report: Report) -> Parts:
    if asked:
        raise ExportRefused(f"no explain graph can be added: {why}")
    report(f"no explain graph: {why}")
    return parts


def _find(model: nn.Module, files: list[Path]) -> dict[int, _Place]:
    """Return where in the files the larger tensors of a model lie byte for byte, by their addresses."""
    found: dict[int, _Place] = {}
    for file in files:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            near = 0  # the exporter stores tensors in the order of layers, as `state_dict` returns them
            for tensor in model.state_dict().values():
                if tensor.nbytes < _SMALLEST_SHARED or tensor.data_ptr() in found:
                    continue
                content = tensor.detach().contiguous().numpy().tobytes()
                offset = _offset(data, content, near)
                if offset is not None:
                    found[tensor.data_ptr()] = _Place(file.name, offset)
                    near = offset + len(content)
    return found


def _offset(data: mmap.mmap, content: bytes, near: int) -> int | None:
    """Return where `content` lies in `data`, looking from `near` on first."""
    needle = content[:_NEEDLE]
    if not any(needle):  # zeros are everywhere
        return None
    for start in (near, 0):
        offset = data.find(needle, start)
        if offset >= 0 and data[offset : offset + len(content)] == content:
            return offset
    return None


def _write(directory: Path, traced: _Traced, shown: Shown, shared: dict[int, _Place]) -> tuple[TensorSpec, ...]:
    """Write the graph and return its outputs."""
    names = [spec.output for spec in shown.weights]
    example = tuple(torch.from_numpy(array) for array in _inputs(shown, 3).values())
    with torch.no_grad():
        heads = [weights.shape[1] for weights in traced(*example)]
    axes = tuple(
        {index: torch.export.Dim(axis, min=1) for index, axis in enumerate(tensor.axes) if isinstance(axis, str)}
        for tensor in shown.inputs
    )
    inputs = [tensor.name for tensor in shown.inputs]
    # Unoptimised, so that tensors keep their form: folded transposes would be found in no file.
    model = trace(traced, example, (axes,), inputs=inputs, outputs=names, optimize=False).model
    RemoveUnusedNodesPass()(model)
    for node in model.graph.all_nodes():  # the exporter notes down whole stack traces
        node.metadata_props.clear()
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        place = shared.get(tensor.raw.data_ptr()) if isinstance(tensor.raw, Tensor) else None
        if place is not None:
            value.const_value = ir.ExternalTensor(
                place.file, place.offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=directory
            )
    ir.save(model, directory / GRAPH_FILE)
    return tuple(_output(spec, num_heads, shown) for spec, num_heads in zip(shown.weights, heads, strict=True))


def _output(spec: WeightsSpec, num_heads: int, shown: Shown) -> TensorSpec:
    tokens, source = (
        next((tensor.axes[1] for tensor in shown.inputs if tensor.role is role), 1)
        for role in (Role.TOKEN_IDS, Role.SOURCE_IDS)
    )
    patches = 1 if shown.grid is None else shown.grid[0] * shown.grid[1] + shown.class_token
    sizes = {
        Places.TOKENS: tokens,
        Places.WRITTEN: tokens,
        Places.SOURCE: source,
        Places.PATCHES: patches,
        Places.GLANCE: 1,
    }
    axes = (1, num_heads, sizes[spec.rows], sizes[spec.columns])
    return TensorSpec(name=spec.output, role=Role.WEIGHTS, dtype=DType.FLOAT32, axes=axes)


def _inputs(shown: Shown, *lengths: int) -> Arrays:
    """Return random inputs: texts of so many tokens in the order of inputs (the last length holds for the rest)."""
    numbers = np.random.default_rng(sum(lengths))
    wanted = iter(lengths)
    length, arrays = lengths[-1], {}
    for tensor in shown.inputs:
        if tensor.role is Role.IMAGE:
            arrays[tensor.name] = numbers.random(tensor.axes, np.float32)
            continue
        length = next(wanted, length)
        axis = tensor.axes[1]
        count = axis if isinstance(axis, int) else min(length, shown.lengths[tensor.role])
        arrays[tensor.name] = numbers.integers(0, shown.vocabulary[tensor.role], (1, count))
    return arrays


def _session(graph: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _checks(session: ort.InferenceSession, traced: _Traced, shown: Shown) -> Iterator[Check]:
    """Compare the graph with the model over lengths, in both orders where there are two texts."""
    pairs = sorted({*zip(_LENGTHS, _LENGTHS[::-1], strict=True), *zip(_LENGTHS, _LENGTHS, strict=True)})
    worst = unequal = 0.0
    hidden = 0
    grid = set()
    for pair in pairs:
        inputs = _inputs(shown, *pair)
        if (shapes := tuple(array.shape[1:] for array in inputs.values())) in grid:
            continue
        grid.add(shapes)
        with torch.no_grad():
            expected = traced(*map(torch.from_numpy, inputs.values()))
        for spec, ours, theirs in zip(shown.weights, session.run(None, inputs), expected, strict=True):
            worst = max(worst, float(np.abs(ours - theirs.numpy()).max()))
            unequal = max(unequal, float(np.abs(ours.sum(-1) - 1).max()))
            hidden += _seen_where_hidden(spec, ours)
    lengths = "inputs of " + ", ".join(
        " and ".join("x".join(map(str, one)) for one in shapes) for shapes in sorted(grid)
    )
    yield Check(name="attention weights", measured=worst, bound=PARITY_BOUND, grid=lengths)
    yield Check(name="sums of attention weights, less 1", measured=unequal, bound=PARITY_BOUND, grid=lengths)
    yield Check(name="attention weights above 0 where none is allowed", measured=hidden, bound=0, grid=lengths)


def _seen_where_hidden(spec: WeightsSpec, weights: NDArray[np.float32]) -> int:
    rows, columns = weights.shape[2:]
    distance = np.arange(columns) - np.arange(rows)[:, None]
    hidden = np.zeros((rows, columns), bool)
    if spec.left is not None:
        hidden |= distance < -spec.left
    if spec.right is not None:
        hidden |= distance > spec.right
    return int((weights[..., hidden] != 0).sum())


def _record(golden: Path, session: ort.InferenceSession, shown: Shown) -> None:
    """Add a small run to the golden file, which the service replays when it first loads the graph."""
    inputs = _inputs(shown, _GOLDEN_LENGTH)
    names = [spec.output for spec in shown.weights]
    outputs = dict(zip(names, session.run(names, inputs), strict=True))
    with np.load(golden) as file:
        arrays = dict(file)
    np.savez(golden, **arrays, **{f"explain.{name}": array for name, array in (inputs | outputs).items()})
