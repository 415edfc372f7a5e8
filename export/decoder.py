"""The fast step graph of a softmax decoder, alone or about a source: which decoders have one, and how it is written."""

from pathlib import Path

from attendant.bundle import CAPACITY, GraphSpec, StateRule, StateSpec
from export.calibration import measure_sizes
from export.described import write_graph
from export.graph import StepGraph
from export.linear import FLOAT_KERNELS, INTEGER_KERNELS
from export.parts import Report
from export.rewrite import prepare_for_rounding
from export.text import CALIBRATION, tokens_of
from export.weights import decoder_weights
from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.attention.normalizers import masked_softmax
from models.checkpoint import TrainedModel
from models.decoder import Decoder
from models.encoder_decoder import SourceToSequence
from models.model import Model
from models.transformer import TransformerLayer

_KNOWN = {"attention": "softmax", "qk_norm": False, "softcap": None, "norm_first": True, "scale_embeddings": False}
_POSITIONS = ("rotary", "learned", "sinusoidal")


def decoder_of(module: Model) -> Decoder | None:
    """Return the decoder of a model whose every part is as its configuration says, or None."""
    decoder = module.decoder if isinstance(module, SourceToSequence) else module
    return decoder if type(decoder) is Decoder else None


def obstacle(module: Model) -> str | None:
    """Return why a model has no fast graph, or None if it has one."""
    decoder = decoder_of(module)
    if decoder is None:
        return f"it is a {type(module).__name__}"
    config = decoder.config
    for field, value in _KNOWN.items():
        if getattr(config, field) != value:
            return f"{field} is {getattr(config, field)!r}"
    if config.positions not in _POSITIONS:
        return f"positions is {config.positions!r}"
    multiple = 16 if config.positions == "rotary" else 8
    if config.head_dim % multiple:
        return f"head_dim is {config.head_dim}, with {config.positions} positions no multiple of {multiple}"
    if not all(_is_plain(layer) for layer in decoder.layers):
        return "a layer has attention of its own"
    return None


def _is_plain(layer: TransformerLayer) -> bool:
    parts = [layer.attention] if layer.cross_attention is None else [layer.attention, layer.cross_attention]
    return all(
        type(part) in (MultiHeadAttention, CrossAttention) and part.normalizer is masked_softmax for part in parts
    )


def appended(state: StateSpec) -> StateSpec:
    """Return a state as the fast graph has it: a ring keeps all positions, of which those behind it are released."""
    if state.rule is not StateRule.RING:
        return state
    rows, heads, window, width = state.axes
    assert isinstance(window, int), state
    changed = {"rule": StateRule.APPEND, "axes": (rows, heads, CAPACITY, width), "window": window}
    return StateSpec(**(dict(state) | changed))


def write_fast_step(
    directory: Path, model: TrainedModel, precision: str, graph: GraphSpec, max_model_len: int, report: Report
) -> None:
    """Write the fast step graph of a model without an obstacle.

    Args:
        directory: where the bundle is being made.
        model: with a decoder.
        precision: "fp32" or "int8".
        graph: what the manifest says of it.
        max_model_len: longest sequence to serve, in tokens.
        report: takes one line for every stage.
    """
    decoder = decoder_of(model.module)
    assert decoder is not None, "the caller asks for obstacles first"
    weights, kernels = decoder_weights(decoder), FLOAT_KERNELS
    if precision == "int8":
        assert model.tokenizer is not None, "the caller refuses a generating model without a tokenizer"
        report("measuring activations and rotating weights")
        sizes = measure_sizes(decoder, tokens_of(CALIBRATION, model.tokenizer.json))
        weights, kernels = prepare_for_rounding(weights, sizes), INTEGER_KERNELS
    report(f"tracing and writing the {precision} step graph")
    write_graph(StepGraph(weights, kernels, max_model_len), graph, directory)
