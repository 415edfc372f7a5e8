"""A decoder becomes the parts of a bundle: the step graph, its certificate, its golden run."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from attendant.bundle import Limits
from export import manifest as describe
from export.calibration import measure_sizes
from export.certificate import certify
from export.errors import ExportRefused, refuse_others
from export.golden import record_golden
from export.graph import StepGraph
from export.linear import FLOAT_KERNELS, INTEGER_KERNELS
from export.onnx_export import write_onnx
from export.parts import Parts, Report
from export.rewrite import prepare_for_rounding
from export.runner import Runner
from export.samples import NUM_ROWS, of_text
from export.text import CALIBRATION, tokens_of
from export.weights import decoder_weights
from models.checkpoint import TrainedModel
from models.decoder_config import DecoderConfig

_CACHE_TOKENS = 576  # of a row while checking: a window of the quality text fits


def export_decoder(
    directory: Path, model: TrainedModel, precision: str, max_model_len: int, text: NDArray[np.int64], report: Report
) -> Parts:
    """Write graph and golden run into `directory`, and return what the manifest says of them.

    Args:
        directory: where the bundle is being made.
        model: with a `Decoder`.
        precision: "fp32" or "int8".
        max_model_len: longest sequence to serve, in tokens.
        text: token ids of the quality text.
        report: takes one line for every stage and check.

    Raises:
        ExportRefused: the decoder cannot be exported, or a check failed.
    """
    config = model.module.config
    _refuse_unfit(config)
    weights, kernels = decoder_weights(model.module), FLOAT_KERNELS
    if precision == "int8":
        report("measuring activations and rotating weights")
        sizes = measure_sizes(model.module, tokens_of(CALIBRATION, model.tokenizer.json))
        weights, kernels = prepare_for_rounding(weights, sizes), INTEGER_KERNELS
    report(f"tracing and writing the {precision} graph")
    path = directory / describe.GRAPH_FILE
    write_onnx(StepGraph(weights, kernels, max_model_len), path)
    runner = Runner(path, num_rows=NUM_ROWS, capacity=min(max_model_len, _CACHE_TOKENS))
    report("checking the graph against the decoder")
    samples = of_text(text)
    certificate = certify(precision, path, runner, model.module, samples, report, text)
    return Parts(
        family="decoder",
        tasks=("generate",),
        limits=Limits(max_model_len=max_model_len),
        graphs=(describe.step_graph(config),),
        states=describe.states(config),
        golden=record_golden(runner, samples, precision, directory),
        certificate=certificate,
    )


def _refuse_unfit(config: DecoderConfig) -> None:
    known = {"attention": "softmax", "window": None, "qk_norm": False, "softcap": None, "norm_first": True}
    refuse_others("decoders", config, known | {"scale_embeddings": False})
    if config.positions in ("alibi", "none"):
        raise ExportRefused(f"positions is {config.positions!r}: export knows rotary, learned and sinusoidal")
    multiple = 16 if config.positions == "rotary" else 8
    if config.head_dim % multiple:
        raise ExportRefused(
            f"head_dim is {config.head_dim}: with {config.positions} positions it must be a multiple of {multiple}"
        )
