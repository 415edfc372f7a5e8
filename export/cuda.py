"""A softmax decoder becomes the parts of a bundle for CUDA: the fast graph in fp16 or bf16, proved without a device.

The proof has four parts. The same exporter writes an fp32 twin from the same rounded numbers, which passes every check
of an fp32 bundle on this processor. The half graph is that twin, node for node. The CUDA provider has a kernel for each
node and copies nothing between host and device. And PyTorch in the half type finds the quality text about as likely as
in fp32. What only the device can show, the service checks when it loads the bundle.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from attendant.bundle import TOKENS, Certificate, Check, DType, Golden, GraphSpec, Limits, StateSpec
from export import cuda_kernels, twin
from export import manifest as describe
from export.certificate import Oracle, certify, half_quality, relative_error, run_checks
from export.decoder import appended, decoder_of
from export.described import trace_graph, write_graph
from export.errors import ExportRefused
from export.golden import record_half_golden
from export.graph import StepGraph
from export.half import first_layers, half_decoder, streamed
from export.linear import FLOAT_KERNELS
from export.parts import Parts, Report
from export.runner import Runner
from export.sampler import write_sampler
from export.sampler_check import sampler_checks
from export.samples import NUM_ROWS, of_text
from export.weights import DecoderWeights, decoder_weights
from models.checkpoint import TrainedModel
from models.decoder import Decoder

MAX_HEAD_DIM = 256  # of the provider's attention
TWIN_BYTES = 2 << 30
"""Most weights, in bytes of fp32, of a twin of the whole decoder; that of a larger one has `TWIN_LAYERS` layers."""
TWIN_LAYERS = 3
_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def export_for_cuda(
    directory: Path,
    model: TrainedModel,
    precision: str,
    max_model_len: int,
    cache_tokens: int,
    text: NDArray[np.int64],
    report: Report,
) -> Parts:
    """Write the half graph and its golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: a decoder without an obstacle, that continues texts.
        precision: "fp16" or "bf16".
        max_model_len: longest sequence to serve, in tokens.
        cache_tokens: of a row while checking.
        text: token ids of the quality text.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the model cannot be exported, or a check failed.
    """
    decoder = decoder_of(model.module)
    assert decoder is not None, "the caller asks for obstacles first"
    if decoder.config.head_dim > MAX_HEAD_DIM:
        raise ExportRefused(
            f"precision is {precision!r}: head_dim is {decoder.config.head_dim}, and attention on CUDA takes at most"
            f" {MAX_HEAD_DIM}"
        )
    half = half_decoder(decoder, precision)
    num_layers = _twin_layers(half)
    wide, is_whole = first_layers(half, num_layers), num_layers == half.config.num_layers
    capacity, samples = min(max_model_len, cache_tokens), of_text(text)
    report(f"tracing and writing the {precision} step graph")
    weights, states = decoder_weights(half), _states(half)
    step = _step_graph(half, states)
    write_graph(StepGraph(weights, FLOAT_KERNELS, max_model_len), step, directory)
    with tempfile.TemporaryDirectory(prefix=".twin-", dir=directory.parent) as scratch:
        report(f"writing the fp32 twin, with {num_layers} of {half.config.num_layers} layers, and checking it")
        twin_file = Path(scratch) / step.file
        twin_step = _step_graph(wide, _states(wide))
        write_graph(StepGraph(decoder_weights(wide), FLOAT_KERNELS, max_model_len), twin_step, twin_file.parent)
        runner = Runner(twin_file, num_rows=NUM_ROWS, capacity=capacity)
        certificate = certify("fp32", twin_file, runner, wide, samples, report)
        checks = [_of_twin(check, num_layers, half.config.num_layers) for check in certificate.checks]
        report("comparing the graphs")
        twin_graph = ir.load(twin_file).graph
        whole = twin_graph if is_whole else _hollow_graph(weights, half, max_model_len)
        checks += run_checks(_structure(ir.load(directory / step.file).graph, twin_graph, whole, precision), report)
    report("writing and checking the graphs that choose tokens")
    sampler = write_sampler(directory, half.config.vocab_size)
    checks += run_checks(sampler_checks(directory, sampler), report)
    quality = None
    if not model.synthetic:
        report("measuring quality in PyTorch")
        quality = half_quality(decoder, half, text, capacity - 1, report)
    report("recording the golden run")
    oracle = Oracle(wide if is_whole else _widened(half))
    golden = record_half_golden(oracle, Oracle(half), samples, capacity, directory)
    if precision == "fp16" and is_whole:
        checks += run_checks([_cpu_check(directory / step.file, oracle, golden)], report)
    return Parts(
        family="decoder",
        tasks=("generate",),
        limits=Limits(max_model_len=max_model_len),
        graphs=(step, *sampler),
        states=states,
        golden=golden,
        certificate=Certificate(checks=tuple(checks), quality=quality),
        target="cuda",
    )


def _widened(half: Decoder) -> Decoder:
    """Return a decoder in float32: whole where memory is free for it twice, else a layer at a time, which is slow."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return first_layers(half, half.config.num_layers) if free > 2 * _wide_bytes(half) else streamed(half)


def _twin_layers(half: Decoder) -> int:
    """Return how many layers the twin has: all, unless that would be a very large one."""
    is_small = _wide_bytes(half) <= TWIN_BYTES
    return half.config.num_layers if is_small else min(TWIN_LAYERS, half.config.num_layers)


def _wide_bytes(half: Decoder) -> int:
    """Return how many bytes its weights are in float32."""
    return 4 * sum(tensor.numel() for tensor in half.weights().values())


def _of_twin(check: Check, num_layers: int, of: int) -> Check:
    grid = check.grid if num_layers == of else f"the first {num_layers} of {of} layers; {check.grid}"
    return check.model_copy(update={"name": f"fp32 twin: {check.name}", "grid": grid})


def _states(decoder: Decoder) -> tuple[StateSpec, ...]:
    return tuple(appended(state) for state in describe.states(decoder, None))


def _step_graph(decoder: Decoder, states: tuple[StateSpec, ...]) -> GraphSpec:
    return describe.step_graph(states, decoder.config.vocab_size, tokens=TOKENS, total_length=True)


def _hollow_graph(weights: DecoderWeights, half: Decoder, max_model_len: int) -> ir.Graph:
    """Trace the fp32 graph of all layers without their weights."""
    states = tuple(state.model_copy(update={"dtype": DType.FLOAT32}) for state in _states(half))
    module = StepGraph(twin.hollow(weights), FLOAT_KERNELS, max_model_len)
    return trace_graph(module, _step_graph(half, states)).model.graph


def _structure(half: ir.Graph, twin_graph: ir.Graph, whole: ir.Graph, precision: str) -> Iterator[Check]:
    def none(name: str, found: list[str], grid: str) -> Check:
        first = "".join(f"; the first: {each:.300}" for each in found[:1])
        return Check(name=name, measured=float(len(found)), bound=0, grid=grid + first)

    num_nodes = f"{sum(1 for _ in half)} nodes"
    depth = "" if whole is twin_graph else ", beside the fp32 graph of all layers, traced without weights"
    differing = twin.differing_nodes(half, whole, _TYPES[precision])
    yield none("nodes that differ from the fp32 twin", differing, num_nodes + depth)
    yield none(
        "weights that differ from the fp32 twin's",
        twin.differing_weights(half, twin_graph),
        f"the twin's {len(twin_graph.initializers)} tensors, rounded to {precision}",
    )
    yield none("nodes that CUDA has no kernel for", cuda_kernels.nodes_without_kernel(half), num_nodes)
    yield none("values copied between host and device", cuda_kernels.copies(half), num_nodes)


def _cpu_check(graph: Path, oracle: Oracle, golden: Golden) -> Check:
    """Run an fp16 graph on the CPU, where ONNX Runtime computes in fp32 and rounds behind every operator."""
    text = np.load(graph.with_name(golden.file))["text"]
    measured = Runner(graph, num_rows=1, capacity=len(text)).all_logits(text)
    return Check(
        name="the fp16 graph on the CPU",
        measured=relative_error(measured, oracle.all_logits(text)),
        bound=golden.bound,
        grid=f"1 row, the golden text of {len(text)} tokens, against PyTorch in fp32 with the same weights",
    )
