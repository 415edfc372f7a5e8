"""An encoder of texts becomes the parts of a bundle: the encode graph, its certificate, its golden run.

Errors are max |a - b| / max |a| over what the graph makes of one text. An 8-bit graph is held to exact arithmetic, to
the direction of the vectors that come of it, and to the probabilities that come of its logits.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attendant.bundle import (
    LOGIT_ROWS,
    ROWS,
    TOKENS,
    Certificate,
    Check,
    DType,
    Embedding,
    Golden,
    GraphKind,
    GraphSpec,
    Limits,
    Role,
    TensorSpec,
)
from attendant.processor import processor_features
from export.calibration import measure_inputs
from export.certificate import PARITY_BOUND, relative_error, run_checks
from export.encode_graph import EncodeGraph
from export.encode_runner import Array, EncodeRunner, Tokens
from export.encoder_task import EncoderTask, task_of
from export.errors import refuse_others
from export.golden import BOUND as GOLDEN_BOUND
from export.golden import FILE as GOLDEN_FILE
from export.integers import exactness_check
from export.linear import FLOAT_KERNELS, MIXED_KERNELS
from export.onnx_export import trace
from export.parts import Parts, Report
from export.text import CALIBRATION, QUALITY, windows_of
from models.checkpoint import TrainedModel

GRAPH_FILE = "encode.onnx"
COSINE_BOUND = 1e-3
PROBABILITY_BOUND = 0.05
_LENGTHS = (1, 2, 3, 16, 17, 64, 191)
_BATCHES = (2, 5, 8)
_GOLDEN_LENGTHS = (2, 9, 24, 48)
_SAMPLED_TEXTS = 64


def export_encoder(
    directory: Path, model: TrainedModel, precision: str, max_model_len: int, text: Tokens, report: Report
) -> Parts:
    """Write graph and golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: with an encoder, bare or with a head.
        precision: "fp32" or "int8".
        max_model_len: longest text to serve, in tokens.
        text: token ids of the quality text.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the encoder cannot be exported, or a check failed.
    """
    task = task_of(model)
    assert task is not None, "what is no encoder is not brought here"
    _refuse_unfit(task)
    kernels, inputs = FLOAT_KERNELS, None
    if precision == "int8":
        assert model.tokenizer is not None, "an encoder of texts has a tokenizer"
        report("measuring activations")
        kernels = MIXED_KERNELS
        inputs = measure_inputs(task.encoder, windows_of(CALIBRATION, model.tokenizer.json, max_model_len))
    report(f"tracing and writing the {precision} graph")
    module = EncodeGraph(task.encoder, kernels, task.make_head(kernels), inputs)
    path = directory / GRAPH_FILE
    _write_graph(module, _output_name(task), path)
    graph = EncodeRunner(path)
    report("checking the graph against the encoder")
    checks = _checks(path, graph, task, precision, max_model_len, text)
    certificate = Certificate(checks=run_checks(checks, report))
    return Parts(
        family=task.family,
        tasks=(task.name,),
        limits=Limits(max_model_len=max_model_len),
        graphs=(_spec(module, task),),
        golden=_record_golden(directory, graph, task, precision, max_model_len, text),
        certificate=certificate,
        embedding=_embedding(model, task),
        classes=task.classes,
    )


def _write_graph(graph: EncodeGraph, output: str, path: Path) -> None:
    """Write a graph to `path`, and its weights beside it to `path` + ".data"."""
    rows, tokens, places = (torch.export.Dim(name, min=1) for name in (ROWS, TOKENS, LOGIT_ROWS))
    token_ids, lengths = torch.zeros(2, 3, dtype=torch.int64), torch.full((2,), 3, dtype=torch.int32)
    extra = {
        "segment_ids": (torch.zeros_like(token_ids), {0: rows, 1: tokens}),
        "logits_index": (torch.arange(4), {0: places}),
    }
    taken = [extra[name] for name in graph.extra_inputs]
    example: tuple[Any, ...] = (token_ids, lengths)
    shapes: tuple[Any, ...] = ({0: rows, 1: tokens}, {0: rows})
    if taken:  # the exporter takes an empty list for an input
        example, shapes = (*example, [tensor for tensor, _ in taken]), (*shapes, [shape for _, shape in taken])
    program = trace(graph, example, shapes, inputs=["token_ids", "lengths", *graph.extra_inputs], outputs=[output])
    program.save(path, external_data=True)


def _embedding(model: TrainedModel, task: EncoderTask) -> Embedding | None:
    if task.name != "embed" or model.embedding is None:
        return None
    width = task.encoder.config.stack.d_model
    return Embedding(pooling=model.embedding.pooling, normalize=model.embedding.normalize, width=width)


def _refuse_unfit(task: EncoderTask) -> None:
    config = task.encoder.config
    refuse_others("encoders", config.stack, {"attention": "softmax", "window": None, "qk_norm": False})
    known = config.stack.positions if config.stack.positions in ("none", "rotary") else "none' or 'rotary"
    refuse_others("encoders", config.stack, {"positions": known})
    refuse_others("encoders", config, {"scale_embeddings": False})


def _checks(
    path: Path, graph: EncodeRunner, task: EncoderTask, precision: str, max_model_len: int, text: Tokens
) -> Iterator[Check]:
    lengths = sorted({min(length, max_model_len) for length in (*_LENGTHS, max_model_len)})
    rows = [task.row(text[index : index + length]) for index, length in enumerate(lengths)]
    if precision == "fp32":
        yield Check(
            name=f"{_output_name(task)} of one text",
            measured=max(relative_error(graph([row])[0], task.oracle(row)) for row in rows),
            bound=PARITY_BOUND,
            grid=f"1 row of {lengths} tokens",
        )
    else:
        yield exactness_check(path, text)
        yield _quantisation_check(graph, task, max_model_len, text)
    differing = 0
    alone = [graph([row])[0] for row in rows]
    for size in _BATCHES:
        for start in range(0, len(rows), size):
            together = graph(rows[start : start + size][::-1])[::-1]
            differing += sum(
                int((one != other).sum()) for one, other in zip(alone[start : start + size], together, strict=True)
            )
    yield Check(
        name="values that depend on neighbours and padding",
        measured=float(differing),
        bound=0,
        grid=f"batches of up to {list(_BATCHES)} rows of {lengths} tokens, each row also alone without padding",
    )


def _quantisation_check(graph: EncodeRunner, task: EncoderTask, max_model_len: int, text: Tokens) -> Check:
    """Compare mean vectors, or else probabilities, with those of the model as trained, over texts of many lengths."""
    lengths = np.linspace(4, min(max_model_len, 128), _SAMPLED_TEXTS).astype(int)
    ends = lengths.cumsum() % (len(text) - int(lengths.max()))
    rows = [task.row(text[end : end + length]) for end, length in zip(ends, lengths, strict=True)]
    pairs = [(graph([row])[0], task.oracle(row)) for row in rows]
    grid = f"{len(rows)} pieces of {QUALITY.name} of {lengths[0]} to {lengths[-1]} tokens"
    if task.name == "embed":
        cosines = [
            float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
            for ours, theirs in ((one.mean(0), other.mean(0)) for one, other in pairs)
        ]
        return Check(
            name="1 - mean cosine of mean vectors to the encoder's",
            measured=1 - float(np.mean(cosines)),
            bound=COSINE_BOUND,
            grid=grid,
        )
    multi_label = task.classes is not None and task.classes.multi_label
    moved = [np.abs(_probabilities(one, multi_label) - _probabilities(other, multi_label)) for one, other in pairs]
    share = [each.max(-1) if each.shape[-1] == 1 or multi_label else each.sum(-1) / 2 for each in moved]
    return Check(
        name="probability that moved to other answers than the model's, on average",
        measured=float(np.concatenate([np.atleast_1d(each) for each in share]).mean()),
        bound=PROBABILITY_BOUND,
        grid=grid,
    )


def _probabilities(logits: Array, multi_label: bool) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    if multi_label or wide.shape[-1] == 1:
        return 1 / (1 + np.exp(-wide))
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _record_golden(
    directory: Path, graph: EncodeRunner, task: EncoderTask, precision: str, max_model_len: int, text: Tokens
) -> Golden:
    lengths = [min(length, max_model_len) for length in _GOLDEN_LENGTHS]
    rows = [task.row(text[index : index + length]) for index, length in enumerate(lengths)]
    arrays = {
        "token_ids": np.concatenate([row.token_ids for row in rows]),
        "lengths": np.array(lengths, np.int64),
        "segment_ids": np.concatenate([row.segment_ids for row in rows]),
        "places": np.concatenate([row.places for row in rows]),
        "num_places": np.array([len(row.places) for row in rows], np.int64),
        _output_name(task): np.concatenate([np.atleast_2d(graph([row])[0]) for row in rows]),
    }
    np.savez(directory / GOLDEN_FILE, **arrays)
    return Golden(
        file=GOLDEN_FILE,
        bound=GOLDEN_BOUND,
        cosine_bound=COSINE_BOUND if task.name == "embed" else PROBABILITY_BOUND,
        bitwise=precision == "int8",
        bitwise_on=processor_features(),
    )


def _output_name(task: EncoderTask) -> str:
    return "hidden" if task.name == "embed" else "logits"


def _spec(graph: EncodeGraph, task: EncoderTask) -> GraphSpec:
    inputs = [
        TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, TOKENS)),
        TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
    ]
    if graph.takes_segments:
        inputs.append(TensorSpec(name="segment_ids", role=Role.SEGMENT_IDS, dtype=DType.INT64, axes=(ROWS, TOKENS)))
    if graph.head.picks:
        inputs.append(TensorSpec(name="logits_index", role=Role.LOGITS_INDEX, dtype=DType.INT64, axes=(LOGIT_ROWS,)))
    name = _output_name(task)
    output = TensorSpec(name=name, role=Role(name), dtype=DType.FLOAT32, axes=task.axes)
    return GraphSpec(
        kind=GraphKind.ENCODE,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=tuple(inputs),
        outputs=(output,),
    )
