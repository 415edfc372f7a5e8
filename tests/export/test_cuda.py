"""Bundles for CUDA: what they hold, what their certificate finds, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from attendant.bundle import TOKENS, DType, GraphKind, Manifest, Quality, read_manifest
from export import cuda, cuda_kernels, golden, twin
from export import manifest as describe
from export.bundle import ExportRefused, Target, export_bundle
from export.certificate import Oracle, half_quality, relative_error
from export.described import write_graph
from export.golden import record_half_golden
from export.graph import StepGraph
from export.half import HALF_TYPES, first_layers, half_decoder, streamed
from export.linear import FLOAT_KERNELS
from export.runner import Runner
from export.samples import of_text
from export.text import QUALITY, tokens_of
from export.weights import decoder_weights
from models import checkpoint
from models.checkpoint import TrainedModel
from models.classifier import Classifier, ClassifierConfig
from models.decoder import Decoder, DecoderConfig
from models.encoder import EncoderConfig, StackConfig

CHECKPOINTS = Path(__file__).parents[2] / "models" / "checkpoints"
LLAMA = DecoderConfig(
    vocab_size=256,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=48,
    max_model_len=96,
    positions="rotary",
    norm="rms",
    norm_eps=1e-5,
    activation="swiglu",
    bias="none",
    tie_embeddings=True,
)
# Of the others each has what no other has: learned positions, sinusoids, every activation, biases.
GPT2 = replace(LLAMA, positions="learned", norm="layer", activation="gelu_tanh", bias="all", tie_embeddings=False)
MIXTURE = replace(LLAMA, positions="sinusoidal", norm="layer", activation="relu", bias="qkv")
CASES = {"llama, fp16": (LLAMA, "fp16"), "gpt2, bf16": (GPT2, "bf16"), "mixture, fp16": (MIXTURE, "fp16")}
SLOW_CASES = {"gpt2, bf16", "mixture, fp16"}
IR_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Bundle:
    """A decoder and its bundle."""

    model: TrainedModel
    manifest: Manifest
    directory: Path

    @property
    def graph(self) -> ir.Graph:
        return ir.load(self.directory / "step.onnx").graph


def silent(line: str) -> None:
    """Report nothing."""


def trained(llama: TrainedModel, config: DecoderConfig) -> TrainedModel:
    """A model with weights far from their initial symmetry, of which a random text tells nothing of quality."""
    torch.manual_seed(3)
    module = Decoder(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return replace(llama, module=module, synthetic=True)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_CASES)) for name in CASES]
)
def bundle(request, llama, tmp_path_factory) -> Bundle:
    config, precision = CASES[request.param]
    model = trained(llama, config)
    target = Target(repository=tmp_path_factory.mktemp("bundles"), name="half", version=1)
    export_bundle(model, target, precision=precision, explain=None, report=silent)
    return Bundle(model, read_manifest(target.directory)[0], target.directory)


def test_the_manifest_is_that_of_a_bundle_for_cuda(bundle):
    manifest, dtype = bundle.manifest, DType(str(HALF_TYPES[bundle.manifest.precision]).removeprefix("torch."))
    assert manifest.target == "cuda"
    assert manifest.tasks == ("generate",)
    assert {state.dtype for state in manifest.states} == {dtype}
    assert manifest.graph(GraphKind.STEP).outputs[0].dtype is DType.FLOAT32
    assert manifest.graph(GraphKind.EXPLAIN) is None
    assert manifest.limits.prefill_chunk is None
    assert manifest.provenance.synthetic
    assert manifest.certificate.quality is None


def test_the_certificate_holds_the_checks_of_the_twin_and_of_the_graph(bundle):
    names = {check.name for check in bundle.manifest.certificate.checks}
    assert {f"fp32 twin: {name}" for name in ("one pass", "ragged decode", "logits that depend on chunking")} <= names
    assert "nodes that differ from the fp32 twin" in names
    assert ("the fp16 graph on the CPU" in names) == (bundle.manifest.precision == "fp16")


def test_every_number_but_the_logits_is_half(bundle):
    graph, dtype = bundle.graph, IR_TYPES[bundle.manifest.precision]
    floats = {value.dtype for value in (*graph.initializers.values(), *graph.inputs)} - {
        ir.DataType.INT32,
        ir.DataType.INT64,
    }
    assert floats == {dtype}
    assert [value.dtype for value in graph.outputs] == [ir.DataType.FLOAT] + [dtype] * (len(graph.outputs) - 1)
    # The logits, and the lengths where positions are looked up.
    assert sum(node.op_type == "Cast" for node in graph) == 1 + ("positions" in graph.initializers)


def test_the_golden_run_is_that_of_the_rounded_weights_and_its_bounds_are_those_of_rounding(bundle):
    manifest = bundle.manifest
    arrays = np.load(bundle.directory / manifest.golden.file)
    half = half_decoder(bundle.model.module, manifest.precision)
    wide, rounded = Oracle(first_layers(half, 2)), Oracle(half)
    expected = wide.all_logits(arrays["prompt"])[-1]
    assert relative_error(arrays["prompt_logits"], expected) < 1e-6
    row, steps = 2, arrays["ragged_steps"][2]
    length = int(arrays["ragged_lengths"][row])
    text = np.concatenate((arrays["ragged_prompts"][row][:length], steps))
    assert relative_error(arrays["ragged_logits"][:, row], wide.all_logits(text)[length:]) < 1e-6
    error = relative_error(rounded.all_logits(arrays["prompt"])[-1], expected)
    assert not manifest.golden.bitwise
    assert 4 * error <= manifest.golden.bound < 0.1
    exact = Oracle(bundle.model.module).all_logits(arrays["prompt"])[-1]
    assert relative_error(exact, expected) > 1e-5  # the weights were rounded


def test_an_fp16_graph_on_the_cpu_computes_what_pytorch_does_in_fp16(bundle):
    if bundle.manifest.precision != "fp16":
        pytest.skip("ONNX Runtime has no bfloat16 products on the CPU")
    generator = np.random.default_rng(5)
    half = half_decoder(bundle.model.module, "fp16")
    runner = Runner(bundle.directory / "step.onnx", num_rows=3, capacity=90)
    lengths = np.array([5, 80, 33])
    texts = [generator.integers(0, 256, length + 1) for length in lengths]
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        runner.prefill(text[:length], row=row)
    logits = runner.step([[text[-1]] for text in texts], lengths + 1)
    for row, text in enumerate(texts):
        assert relative_error(logits[row], Oracle(half).all_logits(text)[-1]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("config", [LLAMA, GPT2, MIXTURE], ids=["llama", "gpt2", "mixture"])
def test_a_decoder_of_any_family_is_compared_at_its_whole_depth(llama, tmp_path, monkeypatch, config):
    monkeypatch.setattr(cuda, "TWIN_BYTES", 0)
    monkeypatch.setattr(cuda, "TWIN_LAYERS", 1)
    target = Target(repository=tmp_path, name="deep", version=1)
    manifest = export_bundle(trained(llama, config), target, precision="bf16", report=silent)
    (compared,) = (
        check for check in manifest.certificate.checks if check.name == "nodes that differ from the fp32 twin"
    )
    assert "beside the fp32 graph of all layers" in compared.grid


def test_a_decoder_that_widens_one_layer_at_a_time_is_the_wide_one(llama):
    half, text = half_decoder(trained(llama, LLAMA).module, "bf16"), np.arange(40)
    expected = Oracle(first_layers(half, 2)).all_logits(text)
    assert np.array_equal(Oracle(streamed(half)).all_logits(text), expected)


def _first(graph: ir.Graph, op_type: str) -> ir.Node:
    return next(node for node in graph if node.op_type == op_type)


def _swap_inputs(graph: ir.Graph) -> None:
    node = _first(graph, "GroupQueryAttention")
    key, value = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


def _change_attribute(graph: ir.Graph) -> None:
    _first(graph, "GroupQueryAttention").attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def _drop_a_layer_norm(graph: ir.Graph) -> None:
    node = [node for node in graph if node.op_type == "SkipSimplifiedLayerNormalization"][1]
    node.outputs[0].replace_all_uses_with(node.inputs[0])


def _widen_a_state(graph: ir.Graph) -> None:
    graph.inputs[-1].dtype = ir.DataType.FLOAT


def _forget_the_cast(graph: ir.Graph) -> None:
    graph.outputs[0].dtype = IR_TYPES["fp16"]


PLANTED: dict[str, Callable[[ir.Graph], None]] = {
    "keys and values swapped": _swap_inputs,
    "another rotation": _change_attribute,
    "a norm that nothing reads": _drop_a_layer_norm,
    "a wider state": _widen_a_state,
    "half logits": _forget_the_cast,
}


@pytest.fixture(scope="module")
def graphs(llama, tmp_path_factory) -> tuple[Path, Path]:
    """The files of an fp16 graph and of its fp32 twin."""
    half, files = half_decoder(trained(llama, LLAMA).module, "fp16"), []
    for decoder in (half, first_layers(half, 2)):
        directory = tmp_path_factory.mktemp("graph")
        step = describe.step_graph(describe.states(decoder, None), 256, tokens=TOKENS, total_length=True)
        write_graph(StepGraph(decoder_weights(decoder), FLOAT_KERNELS, 96), step, directory)
        files.append(directory / step.file)
    return files[0], files[1]


def test_a_half_graph_is_its_twin(graphs):
    half, other = (ir.load(path).graph for path in graphs)
    assert twin.differing_nodes(half, other, ir.DataType.FLOAT16) == []
    assert twin.differing_weights(half, other) == []


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_a_planted_difference_is_found(graphs, plant):
    half, other = (ir.load(path).graph for path in graphs)
    plant(half)
    assert twin.differing_nodes(half, other, ir.DataType.FLOAT16)


def test_a_planted_weight_is_found(graphs):
    half, other = (ir.load(path).graph for path in graphs)
    gain = half.initializers["final_norm.gain"]
    planted = gain.const_value.numpy().copy()
    planted[3] = np.nextafter(planted[3], np.float16(9))
    gain.const_value = ir.tensor(planted)
    assert twin.differing_weights(half, other) == ["final_norm.gain"]


def test_an_fp32_graph_has_no_attention_on_cuda(graphs):
    assert set(cuda_kernels.nodes_without_kernel(ir.load(graphs[1]).graph)) == {
        "com.microsoft::GroupQueryAttention of FLOAT"
    }


def _positions(arithmetic: str) -> ir.Graph:
    """Positions of the tokens of [B, S] from each row's last one; how many there are is read from a shape."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        g (int64[B, S] token_ids, int64[B] last) => (int64[B, S] positions) <int64[1] zero = {{0}}, int64 one = {{1}}>
        {{
            shape = Shape <start: int = 1, end: int = 2> (token_ids)
            tokens = Squeeze (shape)
            column = Unsqueeze (last, zero)
            {arithmetic}
        }}
    """
    return ir.from_onnx_text(text).graph


def test_what_the_host_knows_must_not_meet_a_tensor_of_the_device():
    apart = "steps = Range (one, tokens, one) positions = Sub (column, steps)"
    mixed = "less = Sub (tokens, one) positions = Sub (column, less)"
    assert cuda_kernels.copies(_positions(apart)) == []
    assert cuda_kernels.copies(_positions(mixed)) == ["less for Sub"]


@pytest.fixture(scope="module")
def window() -> TrainedModel:
    """A small trained decoder."""
    return checkpoint.load(CHECKPOINTS / "lm-window")


def quality_of(window: TrainedModel, half: Decoder) -> Quality:
    return half_quality(window.module, half, tokens_of(QUALITY, window.tokenizer.json), 255, silent)


@pytest.mark.parametrize("precision", HALF_TYPES)
def test_rounding_costs_next_to_nothing_on_a_real_text(window, precision):
    quality = quality_of(window, half_decoder(window.module, precision))
    assert quality.num_tokens > 8000
    assert 0 < abs(quality.relative_increase) < quality.bound == 0.002


def noisy(decoder: Decoder, precision: str) -> Decoder:
    """A rounding that costs more than it says."""
    torch.manual_seed(1)
    weights = {name: x + 0.02 * torch.randn_like(x) for name, x in decoder.weights().items()}
    return half_decoder(Decoder.from_weights(decoder.config, weights), precision)


def loud(decoder: Decoder, precision: str) -> Decoder:
    """Weights that fit the type, but make activations that do not."""
    weights = {
        name: x * 3e4 if name.endswith("up.weight") else x / 3e4 if name.endswith("down.weight") else x
        for name, x in decoder.weights().items()
    }
    return half_decoder(Decoder.from_weights(decoder.config, weights), precision)


RUINED = pytest.mark.parametrize(
    ("planted", "message"), [(noisy, r"perplexity on \d+ tokens: .* allowed \+0.20%"), (loud, "logits are not finite")]
)


@RUINED
def test_a_decoder_that_rounding_ruins_is_found(window, planted, message):
    with pytest.raises(ExportRefused, match=message):
        quality_of(window, planted(window.module, "fp16"))


@pytest.mark.slow
@RUINED
def test_a_decoder_that_rounding_ruins_becomes_no_bundle(window, tmp_path, monkeypatch, planted, message):
    # Twin and half graph are of the same planted weights, so only the text tells.
    monkeypatch.setattr(cuda, "half_decoder", planted)
    target = Target(repository=tmp_path, name="ruined", version=1)
    with pytest.raises(ExportRefused, match=message):
        export_bundle(window, target, precision="fp16", report=silent)
    assert list((tmp_path / "ruined").iterdir()) == []


@pytest.mark.slow
def test_the_bundle_of_a_trained_decoder_says_what_rounding_cost(window, tmp_path):
    target = Target(repository=tmp_path, name="window", version=1)
    manifest = export_bundle(window, target, precision="bf16", report=silent)
    assert manifest.certificate.quality.num_tokens > 8000
    assert {state.window for state in manifest.states} == {32}
    assert not manifest.provenance.synthetic


def test_a_golden_run_that_proves_nothing_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "_LARGEST_HALF_BOUND", 1e-6)
    half = half_decoder(trained(llama, LLAMA).module, "bf16")
    samples = of_text(np.arange(200) % 256)
    with pytest.raises(ExportRefused, match="a golden run proves nothing"):
        record_half_golden(Oracle(first_layers(half, 2)), Oracle(half), samples, 96, tmp_path)


def _classifier() -> Classifier:
    stack = StackConfig(d_model=32, num_layers=1, num_heads=2, d_ff=32, positions="rotary")
    encoder = EncoderConfig(vocab_size=256, max_source_len=40, positions="none", stack=stack)
    return Classifier(ClassifierConfig(encoder=encoder, num_classes=2))


def _too_large() -> Decoder:
    decoder = Decoder(LLAMA)
    with torch.no_grad():
        decoder.lm_head.weight[3, 3] = 7e4
    return decoder


REFUSED: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "encoder": (_classifier, "only decoders that continue texts are exported for CUDA"),
    "linear attention": (lambda: Decoder(replace(LLAMA, attention="elu")), "attention is 'elu', and such a model is"),
    "wide heads": (
        lambda: Decoder(replace(LLAMA, head_dim=272)),
        "head_dim is 272, and attention on CUDA takes at most",
    ),
    "large weights": (_too_large, r"embedding.weight holds 7e\+04, and the largest number .* is 6.55e\+04"),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_cuda_could_not_serve_is_refused_with_the_reason(llama, tmp_path, refused):
    module, message = refused
    target = Target(repository=tmp_path, name="refused", version=1)
    with pytest.raises(ExportRefused, match=message):
        export_bundle(replace(llama, module=module().eval()), target, precision="fp16", report=silent)
    assert not target.directory.exists()


def test_an_explain_graph_is_refused(llama, tmp_path):
    target = Target(repository=tmp_path, name="refused", version=1)
    with pytest.raises(ExportRefused, match="explain graphs are of bundles for the CPU"):
        export_bundle(llama, target, precision="fp16", explain=True, report=silent)
