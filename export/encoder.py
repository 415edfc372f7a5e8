"""An encoder becomes the parts of a bundle: the encode graph, its certificate, its golden run.

Errors are max |a - b| / max |a| over the vectors of all real tokens of a check. An 8-bit graph is held to exact
arithmetic and to the direction of the vectors that come of it.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from attendant.bundle import (
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
from export.certificate import PARITY_BOUND, relative_error, run_checks
from export.encode_graph import EncodeGraph
from export.errors import ExportRefused, refuse_others
from export.golden import BOUND as GOLDEN_BOUND
from export.golden import FILE as GOLDEN_FILE
from export.integers import exactness_check
from export.linear import FLOAT_KERNELS, MIXED_KERNELS
from export.onnx_export import write_encode_graph
from export.parts import Parts, Report
from export.runner import NUM_THREADS
from export.text import QUALITY
from models.checkpoint import TrainedModel
from models.encoder import Encoder, EncoderConfig

GRAPH_FILE = "encode.onnx"
COSINE_BOUND = 1e-3
_LENGTHS = (1, 2, 3, 16, 17, 64, 191)
_BATCHES = (2, 5, 8)
_GOLDEN_LENGTHS = (2, 9, 24, 48)
_COSINE_TEXTS = 64

Tokens = NDArray[np.int64]
Vectors = NDArray[np.float32]


def export_encoder(
    directory: Path, model: TrainedModel, precision: str, max_model_len: int, text: Tokens, report: Report
) -> Parts:
    """Write graph and golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: with an `Encoder`.
        precision: "fp32" or "int8".
        max_model_len: longest text to serve, in tokens.
        text: token ids of the quality text.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the encoder cannot be exported, or a check failed.
    """
    encoder = model.module
    assert isinstance(encoder, Encoder)
    _refuse_unfit(model)
    report(f"tracing and writing the {precision} graph")
    kernels = FLOAT_KERNELS if precision == "fp32" else MIXED_KERNELS
    write_encode_graph(EncodeGraph(encoder, kernels), directory / GRAPH_FILE)
    graph = EncodeRunner(directory / GRAPH_FILE)
    report("checking the graph against the encoder")
    checks = _checks(directory / GRAPH_FILE, graph, encoder, precision, max_model_len, text)
    certificate = Certificate(checks=run_checks(checks, report))
    assert model.embedding is not None
    return Parts(
        family="encoder",
        tasks=("embed",),
        limits=Limits(max_model_len=max_model_len),
        graphs=(_spec(encoder.config),),
        golden=_record_golden(directory, graph, text, precision, max_model_len),
        certificate=certificate,
        embedding=Embedding(
            pooling=model.embedding.pooling,
            normalize=model.embedding.normalize,
            width=encoder.config.stack.d_model,
        ),
    )


class EncodeRunner:
    """A session of one encode graph, to certify it; the service has its own."""

    def __init__(self, graph: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = NUM_THREADS
        # PyTorch runs in between: threads that spin after each run would take its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, rows: list[Tokens]) -> list[Vectors]:
        """Encode texts of token ids together and return the vectors [S, E] of each."""
        lengths = np.array([len(row) for row in rows], np.int32)
        token_ids = np.zeros((len(rows), lengths.max()), np.int64)
        for index, row in enumerate(rows):
            token_ids[index, : len(row)] = row
        (hidden,) = self._session.run(None, {"token_ids": token_ids, "lengths": lengths})
        return [hidden[index, :length] for index, length in enumerate(lengths)]


def _refuse_unfit(model: TrainedModel) -> None:
    config = model.module.config
    stack = config.stack
    if model.embedding is None:
        raise ExportRefused("the checkpoint does not say how to embed a text (pooling): nothing is served of it")
    known = {"attention": "softmax", "window": None, "positions": "none", "norm": "layer", "norm_first": False}
    refuse_others("encoders", stack, known | {"qk_norm": False})
    refuse_others("encoders", config, {"scale_embeddings": False})


def _checks(
    path: Path, graph: EncodeRunner, encoder: Encoder, precision: str, max_model_len: int, text: Tokens
) -> Iterator[Check]:
    lengths = sorted({min(length, max_model_len) for length in (*_LENGTHS, max_model_len)})
    rows = [text[index : index + length] for index, length in enumerate(lengths)]
    if precision == "fp32":
        yield Check(
            name="vectors of one text",
            measured=max(relative_error(graph([row])[0], oracle(encoder, row)) for row in rows),
            bound=PARITY_BOUND,
            grid=f"1 row of {lengths} tokens",
        )
    else:
        yield exactness_check(path, text)
        yield _cosine_check(graph, encoder, max_model_len, text)
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


def _cosine_check(graph: EncodeRunner, encoder: Encoder, max_model_len: int, text: Tokens) -> Check:
    """Compare mean vectors with those of the encoder as trained, over texts of many lengths."""
    lengths = np.linspace(4, min(max_model_len, 128), _COSINE_TEXTS).astype(int)
    ends = lengths.cumsum() % (len(text) - int(lengths.max()))
    rows = [text[end : end + length] for end, length in zip(ends, lengths, strict=True)]
    cosines = []
    for row in rows:
        ours, theirs = graph([row])[0].mean(0), oracle(encoder, row).mean(0)
        cosines.append(float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)))
    return Check(
        name="1 - mean cosine of mean vectors to the encoder's",
        measured=1 - float(np.mean(cosines)),
        bound=COSINE_BOUND,
        grid=f"{len(rows)} pieces of {QUALITY.name} of {lengths[0]} to {lengths[-1]} tokens",
    )


def oracle(encoder: Encoder, row: Tokens) -> Vectors:
    """Return the vectors [S, E] that PyTorch computes of a text [S]."""
    with torch.no_grad():
        return encoder(torch.from_numpy(row)[None])[0].numpy()


def _record_golden(directory: Path, graph: EncodeRunner, text: Tokens, precision: str, max_model_len: int) -> Golden:
    lengths = [min(length, max_model_len) for length in _GOLDEN_LENGTHS]
    rows = [text[index : index + length] for index, length in enumerate(lengths)]
    np.savez(
        directory / GOLDEN_FILE,
        token_ids=np.concatenate(rows),
        lengths=np.array(lengths, np.int64),
        hidden=np.concatenate([graph([row])[0] for row in rows]),
    )
    return Golden(
        file=GOLDEN_FILE,
        bound=GOLDEN_BOUND,
        cosine_bound=COSINE_BOUND,
        bitwise=precision == "int8",
        bitwise_on=processor_features(),
    )


def _spec(config: EncoderConfig) -> GraphSpec:
    hidden = (ROWS, TOKENS, config.stack.d_model)
    return GraphSpec(
        kind=GraphKind.ENCODE,
        file=GRAPH_FILE,
        data=f"{GRAPH_FILE}.data",
        inputs=(
            TensorSpec(name="token_ids", role=Role.TOKEN_IDS, dtype=DType.INT64, axes=(ROWS, TOKENS)),
            TensorSpec(name="lengths", role=Role.LENGTHS, dtype=DType.INT32, axes=(ROWS,)),
        ),
        outputs=(TensorSpec(name="hidden", role=Role.HIDDEN, dtype=DType.FLOAT32, axes=hidden),),
    )
