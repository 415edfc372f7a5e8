"""Explain graphs of every family, held against the models' own attention weights."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from attendant.bundle import Certificate, Check, Golden, GraphKind, Limits, Role
from export.errors import ExportRefused
from export.explain_graph import OWN_BYTES, add_explain_graph
from export.parts import Parts
from models.attention.heads import Attended
from models.captioner import Captioner, CaptionerConfig
from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.hard_vision import HardVision, HardVisionConfig
from models.masked_lm import MaskedLanguageModel
from models.recurrent import Recurrent, RecurrentConfig
from models.vision import ImageEncoderConfig, VisionTransformer, VisionTransformerConfig

VOCABULARY, TOKENS = 50, 24
STACK = {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}
DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 48,
    "max_model_len": TOKENS,
    "norm": "layer",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "bias": "all",
    "tie_embeddings": True,
}
RECURRENT = {
    "source_vocab_size": VOCABULARY,
    "vocab_size": VOCABULARY,
    "max_source_len": TOKENS,
    "max_model_len": 5,
    "d_embedding": 12,
    "d_encoder": 8,
    "d_decoder": 16,
}
IMAGE = ImageEncoderConfig(height=8, width=12, num_channels=1, patch_size=4, stack=StackConfig(**STACK))
PATCH = VisionTransformerConfig(encoder=IMAGE, num_classes=3)


def decoder(**choices):
    return Decoder(DecoderConfig(**(DECODER | choices)))


def encoder_config(**choices):
    stack = StackConfig(**(STACK | choices))
    return EncoderConfig(vocab_size=VOCABULARY, max_source_len=TOKENS, positions="learned", stack=stack)


def encoder_decoder(encoder, **choices):
    config = DecoderConfig(**(DECODER | {"positions": "sinusoidal"} | choices))
    return EncoderDecoder(EncoderDecoderConfig(encoder=encoder, decoder=config))


# Of each model the kinds of its weights, with the number of layers.
FAMILIES = {
    "rotary decoder": (lambda: decoder(positions="rotary"), {"self": 2}),
    "decoder with a window": (lambda: decoder(positions="alibi", window=5), {"self": 2}),
    "mean decoder": (lambda: decoder(positions="learned", attention="mean"), {"self": 2}),
    "encoder": (lambda: Encoder(encoder_config()), {"self": 2}),
    "encoder with a window": (lambda: Encoder(encoder_config(window=4)), {"self": 2}),
    "masked language model": (lambda: MaskedLanguageModel(encoder_config()), {"self": 2}),
    "vision transformer": (lambda: VisionTransformer(PATCH), {"self": 2}),
    "hard attention": (
        lambda: HardVision(HardVisionConfig(rows=2, columns=3, glance_size=2, d_glance=4, patch=PATCH)),
        {"hard": 1},
    ),
    "encoder-decoder": (lambda: encoder_decoder(encoder_config()), {"encoder": 2, "decoder": 2, "cross": 2}),
    "linear encoder": (lambda: encoder_decoder(encoder_config(attention="elu")), {"decoder": 2, "cross": 2}),
    "captioner": (
        lambda: Captioner(CaptionerConfig(encoder=IMAGE, decoder=DecoderConfig(**DECODER, positions="learned"))),
        {"encoder": 2, "decoder": 2, "cross": 2},
    ),
    "Bahdanau": (
        lambda: Recurrent(RecurrentConfig(**RECURRENT, decoder="bahdanau", attention="additive")),
        {"additive": 1},
    ),
    "Luong": (
        lambda: Recurrent(RecurrentConfig(**RECURRENT, decoder="luong", attention="general")),
        {"multiplicative": 1},
    ),
}


FAST = ("decoder with a window", "encoder-decoder", "hard attention", "Bahdanau")


def parts_in(directory: Path) -> Parts:
    np.savez(directory / "golden.npz", something=np.ones(1))
    return Parts(
        family="any",
        tasks=("embed",),
        limits=Limits(max_model_len=TOKENS),
        graphs=(),
        golden=Golden(file="golden.npz", bound=1e-4, bitwise=False, bitwise_on=()),
        certificate=Certificate(checks=(Check(name="before", measured=0, bound=0, grid="none"),)),
    )


def explained(model, directory: Path, limit: int = TOKENS, asked: bool | None = True) -> Parts:
    parts = parts_in(directory)
    parts = Parts(**{name: getattr(parts, name) for name in parts.__slots__} | {"limits": Limits(max_model_len=limit)})
    return add_explain_graph(directory, model, parts, asked, lambda line: None)


def own_weights(model, inputs) -> list[np.ndarray]:
    """What the model itself says, flat."""
    with torch.no_grad():
        if isinstance(model, EncoderDecoder) and model.config.encoder.stack.attention == "elu":
            written, cross = model.decoder.attention_weights(inputs[1], memory=model.encode(inputs[0]))
            found = [*written, *cross]
        else:
            found = model.attention_weights(*inputs)
    if isinstance(found, torch.Tensor):
        return [found[:, None, None].numpy()]
    nested = [each if isinstance(each, list) else [each] for each in found]
    return [weights.numpy() for layers in nested for weights in layers]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def case(request, tmp_path_factory):
    """A model, its parts with the explain graph, and where they lie."""
    torch.manual_seed(3)
    make, kinds = FAMILIES[request.param]
    model, directory = make().eval(), tmp_path_factory.mktemp("explain")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    limit = RECURRENT["max_model_len"] if isinstance(model, Recurrent) else TOKENS
    return model, explained(model, directory, limit), directory, kinds


def test_the_graph_gives_the_models_weights_for_any_length(case):
    model, parts, directory, _ = case
    graph = parts.graphs[-1]
    assert graph.kind is GraphKind.EXPLAIN
    session = ort.InferenceSession(directory / graph.file, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(4)
    for lengths in ((1, 3), (TOKENS, 1), (7, 11)):
        sizes, inputs = iter(lengths if len(graph.inputs) > 1 else lengths[:1]), []
        for tensor in graph.inputs:
            if tensor.role is Role.IMAGE:
                inputs.append(torch.rand(tensor.axes, generator=generator))
                continue
            size = next(sizes)
            size = tensor.axes[1] if isinstance(tensor.axes[1], int) else size
            inputs.append(torch.randint(0, VOCABULARY, (1, size), generator=generator))
        feed = {tensor.name: value.numpy() for tensor, value in zip(graph.inputs, inputs, strict=True)}
        ours = session.run([tensor.name for tensor in graph.outputs], feed)
        for weights, expected in zip(ours, own_weights(model, inputs), strict=True):
            assert weights.shape == expected.shape
            assert np.abs(weights - expected).max() <= 1e-5
            assert np.abs(weights.sum(-1) - 1).max() <= 1e-5


def test_every_output_is_described(case):
    _, parts, _, kinds = case
    described = {f"{kind}.{layer}" for kind, layers in kinds.items() for layer in range(layers)}
    assert {spec.output for spec in parts.explain.weights} == described
    assert [tensor.name for tensor in parts.graphs[-1].outputs] == [spec.output for spec in parts.explain.weights]
    assert "explain" in parts.tasks
    assert parts.certificate.checks[0].name == "before"
    assert all(check.passed for check in parts.certificate.checks)


def test_the_golden_run_keeps_what_was_in_it(case):
    _, parts, directory, _ = case
    names = {tensor.name for tensor in (*parts.graphs[-1].inputs, *parts.graphs[-1].outputs)}
    with np.load(directory / "golden.npz") as file:
        assert set(file) == {"something"} | {f"explain.{name}" for name in names}


@pytest.mark.parametrize("choices", [{"attention": "elu"}, {"attention": "favor", "num_features": 8}])
def test_linear_attention_has_nothing_to_show(choices, tmp_path):
    model = decoder(positions="rotary", **choices).eval()
    assert explained(model, tmp_path, asked=None).explain is None
    with pytest.raises(ExportRefused, match="computes no attention weights"):
        explained(model, tmp_path)


def test_a_model_whose_own_attention_gives_no_weights_is_exported_without(tmp_path):
    class Silent(torch.nn.Module):
        def forward(self, x, chunk, past=None, *, need_weights=False):
            return Attended(x, None, {})

    model = decoder(positions="rotary").eval()
    for layer in model.layers:
        layer.attention = Silent()
    lines = []
    assert add_explain_graph(tmp_path, model, parts_in(tmp_path), None, lines.append).explain is None
    assert "cannot be traced" in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["golden.npz"]
    with pytest.raises(ExportRefused, match="cannot be traced"):
        add_explain_graph(tmp_path, model, parts_in(tmp_path), True, lines.append)


def test_what_would_make_a_bundle_much_larger_is_added_only_if_asked_for(tmp_path):
    lines = []
    width = OWN_BYTES // 4 // VOCABULARY // 8 * 8 + 8
    with torch.device("meta"):
        large = decoder(positions="rotary", num_layers=1, d_model=width, d_ff=8)
    large = large.to_empty(device="cpu").eval()
    parts = add_explain_graph(tmp_path, large, parts_in(tmp_path), None, lines.append)
    assert parts.explain is None
    assert "--explain adds it" in lines[-1]
