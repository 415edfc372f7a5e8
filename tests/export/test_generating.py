"""Every generating family as a bundle: what its manifest says, and its graphs against PyTorch at other shapes."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from attendant.bundle import GraphKind, Manifest, StateRule, read_manifest
from export import certificate
from export.bundle import ExportRefused, Target, export_bundle
from export.likelihood import compare_quality
from export.runner import Runner
from export.source import source_of
from models.captioner import Captioner, CaptionerConfig
from models.decoder import Decoder, DecoderConfig
from models.encoder import EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.model import Model
from models.recurrent import Recurrent, RecurrentConfig
from models.vision import ImageEncoderConfig

CAPACITY, NUM_ROWS = 40, 4
STACK = StackConfig(
    d_model=24,
    num_layers=1,
    num_heads=2,
    d_ff=32,
    positions="none",
    norm="layer",
    norm_eps=1e-5,
    norm_first=True,
    activation="gelu",
    bias=True,
)
DECODER = DecoderConfig(
    vocab_size=256,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=48,
    max_model_len=CAPACITY,
    positions="rotary",
    norm="rms",
    norm_eps=1e-5,
    activation="swiglu",
    bias="none",
    tie_embeddings=True,
)


def recurrent(decoder: str, attention: str) -> Recurrent:
    return Recurrent(
        RecurrentConfig(
            source_vocab_size=256,
            vocab_size=256,
            max_source_len=20,
            max_model_len=CAPACITY,
            d_embedding=8,
            d_encoder=12,
            d_decoder=24,
            decoder=decoder,
            attention=attention,
            d_key=10,
        )
    )


def encoder_decoder(**decoder: object) -> EncoderDecoder:
    encoder = EncoderConfig(vocab_size=256, max_source_len=21, positions="sinusoidal", stack=STACK)
    return EncoderDecoder(EncoderDecoderConfig(encoder=encoder, decoder=replace(DECODER, **decoder)))


def captioner() -> Captioner:
    encoder = ImageEncoderConfig(height=8, width=12, num_channels=3, patch_size=4, stack=STACK)
    return Captioner(CaptionerConfig(encoder=encoder, decoder=replace(DECODER, norm="layer", activation="gelu")))


FAMILIES = {
    "recurrent, additive": lambda: recurrent("bahdanau", "additive"),
    "encoder-decoder": encoder_decoder,
    "captioner": captioner,
    "window": lambda: Decoder(replace(DECODER, window=7, window_state="ring")),
    "linear": lambda: Decoder(replace(DECODER, num_layers=1, attention="favor", num_features=24)),
    "traced, append": lambda: Decoder(replace(DECODER, num_layers=1, qk_norm=True)),
    "traced, ring": lambda: Decoder(replace(DECODER, num_layers=1, window=7, window_state="ring", softcap=5.0)),
}
SLOW_FAMILIES = {
    "recurrent, multiplicative": lambda: recurrent("luong", "general"),
    "encoder-decoder, traced": lambda: encoder_decoder(norm_first=False),
    "mean": lambda: Decoder(replace(DECODER, attention="mean")),
    "alibi": lambda: Decoder(replace(DECODER, positions="alibi")),
    "elu": lambda: Decoder(replace(DECODER, attention="elu")),
}


@dataclass(frozen=True)
class Bundle:
    """A model, the manifest of its bundle, and where that lies."""

    model: Model
    manifest: Manifest
    directory: Path

    def runner(self) -> Runner:
        source = source_of(self.model)
        return Runner(
            self.directory / "step.onnx",
            num_rows=NUM_ROWS,
            capacity=CAPACITY,
            prefill_chunk=self.manifest.limits.prefill_chunk,
            encode=None if source is None else self.directory / "encode.onnx",
            source_len=0 if source is None else source.padded_len,
        )

    def logits(self, text: np.ndarray, source: np.ndarray | None) -> np.ndarray:
        """What PyTorch says after every token of a text."""
        given = [torch.from_numpy(each)[None] for each in (source, text) if each is not None]
        with torch.no_grad():
            return self.model(*given)[0].numpy()


def trained(llama, module: Model):
    """A model over bytes with weights far from their initial symmetry."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return replace(llama, module=module.eval(), source_tokenizer=llama.tokenizer)


def params(families: dict) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_FAMILIES)) for name in families]


@pytest.fixture(scope="module", params=params(FAMILIES | SLOW_FAMILIES))
def bundle(request, llama, tmp_path_factory) -> Bundle:
    torch.manual_seed(5)
    model = trained(llama, (FAMILIES | SLOW_FAMILIES)[request.param]())
    target = Target(repository=tmp_path_factory.mktemp("bundles"), name="small", version=1)
    export_bundle(model, target, precision="fp32", report=lambda line: None)
    return Bundle(model.module, read_manifest(target.directory)[0], target.directory)


def draws(bundle: Bundle, seed: int) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Random texts of the whole capacity, and sources for them if the bundle takes any."""
    generator = np.random.default_rng(seed)
    source = source_of(bundle.model)
    texts = [generator.integers(0, 256, CAPACITY) for _ in range(NUM_ROWS)]
    return texts, [None] * NUM_ROWS if source is None else source.draw(generator, NUM_ROWS)


def near(measured: np.ndarray, expected: np.ndarray) -> bool:
    return float(np.abs(measured - expected).max()) <= 2e-5 * float(np.abs(expected).max())


def test_every_text_about_every_source_has_the_logits_of_pytorch(bundle):
    runner, (texts, sources) = bundle.runner(), draws(bundle, 1)
    for row, (text, source) in enumerate(zip(texts, sources, strict=True)):
        if source is not None:
            runner.begin(source, row=row)
        assert near(runner.all_logits(text, row=row), bundle.logits(text, source))


def test_rows_of_any_length_and_source_decode_together_and_alone_with_the_same_bits(bundle):
    runner, (texts, sources), lengths = bundle.runner(), draws(bundle, 2), np.array([3, 37, 1, 18])
    for row, (text, source) in enumerate(zip(texts, sources, strict=True)):
        if source is not None:
            runner.begin(source, row=row)
        runner.prefill(text[: lengths[row]], row=row)
    for step in range(2):
        tokens = np.array([[text[length + step]] for text, length in zip(texts, lengths, strict=True)])
        after = lengths + step + 1
        together = runner.step(tokens, after, commit=False)
        for row, (text, source) in enumerate(zip(texts, sources, strict=True)):
            alone = runner.step(tokens[row : row + 1], after[row : row + 1], first_row=row)[0]
            assert np.array_equal(alone, together[row])
            assert near(alone, bundle.logits(text[: after[row]], source)[-1])


def test_what_is_made_of_a_source_has_the_same_bits_alone_and_padded(bundle):
    _, sources = draws(bundle, 3)
    if sources[0] is None:
        assert bundle.manifest.graph(GraphKind.ENCODE) is None
        return
    runner = bundle.runner()
    for source, together in zip(sources, runner.encode(sources), strict=True):
        (alone,) = runner.encode([source])
        assert all(np.array_equal(alone[name], together[name]) for name in alone)


def test_a_step_that_is_not_committed_leaves_what_is_replaced_as_it_was(bundle):
    runner, (texts, sources) = bundle.runner(), draws(bundle, 4)
    if sources[0] is not None:
        runner.begin(sources[0])
    runner.prefill(texts[0][:5])
    first = runner.step(texts[0][None, 5:6], [6], commit=False)
    assert np.array_equal(first, runner.step(texts[0][None, 5:6], [6]))


def test_states_that_are_appended_to_are_written_at_new_positions_only(bundle):
    runner, (texts, sources) = bundle.runner(), draws(bundle, 5)
    appended = [state.input for state in bundle.manifest.states if state.rule is StateRule.APPEND]
    if sources[0] is not None:
        runner.begin(sources[0], row=1)
    runner.prefill(texts[0][:5], row=1)
    before = {name: runner.states[name].copy() for name in appended}
    runner.step(texts[0][None, 5:6], [6], first_row=1)
    for name in appended:
        changed = np.argwhere((runner.states[name] != before[name]).any(axis=(1, 3)))
        assert changed.tolist() == [[1, 5]]


def test_the_graphs_have_the_axes_that_the_manifest_names(bundle):
    for graph in bundle.manifest.graphs:
        model = onnx.load(bundle.directory / graph.file, load_external_data=False)
        for specs, tensors in ((graph.inputs, model.graph.input), (graph.outputs, model.graph.output)):
            for spec, tensor in zip(specs, tensors, strict=True):
                axes = tuple(axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim)
                assert (tensor.name, axes) == (spec.name, spec.axes)


RULES = {
    "recurrent, additive": {"memory": "fixed", "keys": "fixed", "hidden": "replace"},
    "recurrent, multiplicative": {"memory": "fixed", "hidden": "replace", "attentional": "replace"},
    "window": {f"{layer}.{part}": "append" for layer in (0, 1) for part in ("key", "value")},
    "linear": {"0.sums": "replace"},
    "elu": {"0.sums": "replace", "1.sums": "replace"},
    "traced, append": {"0.key": "append", "0.value": "append"},
    "traced, ring": {"0.key": "ring", "0.value": "ring"},
}


def test_the_manifest_states_the_rules_that_the_layers_declare(bundle, request):
    name = request.node.callspec.params["bundle"]
    rules = {state.name: state.rule.value for state in bundle.manifest.states}
    assert rules == RULES.get(name, {spec.name: spec.rule.value for spec in bundle.model.state_specs()})
    windows = {state.window for state in bundle.manifest.states}
    assert windows == ({7} if name == "window" else {None})
    made = {state.name for state in bundle.manifest.states if state.made}
    encode = bundle.manifest.graph(GraphKind.ENCODE)
    assert len(made) == (0 if encode is None else len(encode.outputs))


def test_only_traced_graphs_say_how_prompts_are_cut(bundle, request):
    name = request.node.callspec.params["bundle"]
    fast = name in ("encoder-decoder", "captioner", "window")
    chunk = bundle.manifest.limits.prefill_chunk
    assert chunk == (None if fast else 1 if name.startswith("recurrent") else CAPACITY)
    assert ("chunks" in np.load(bundle.directory / "golden.npz")) == fast


def test_the_golden_run_names_its_sources(bundle):
    arrays, source = np.load(bundle.directory / "golden.npz"), source_of(bundle.model)
    assert ("source" in arrays) == (source is not None)
    if "ragged_source_lengths" in arrays:
        assert arrays["ragged_sources"].shape == (4, arrays["ragged_source_lengths"].max())
        assert bundle.manifest.source_vocabulary.file == "source_tokenizer.json"
    elif source is not None:
        assert arrays["ragged_sources"].shape == (4, 3, 8, 12)
        assert bundle.manifest.image == source.image


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Decoder(replace(DECODER, attention="favor")), "attention is 'favor', and such a model is exported in"),
        (lambda: recurrent("luong", "dot"), "it is a Recurrent, and such a model is exported in fp32 only"),
        (encoder_decoder, "a model that writes about a source is exported in fp32 only"),
    ],
)
def test_int8_is_refused_where_it_could_not_be_vouched_for(llama, tmp_path, module, message):
    target = Target(repository=tmp_path, name="refused", version=1)
    with pytest.raises(ExportRefused, match=message):
        export_bundle(trained(llama, module()), target, precision="int8", report=lambda line: None)
    assert list((tmp_path / "refused").iterdir()) == []


def test_a_model_without_a_tokenizer_is_refused(llama, tmp_path):
    model = replace(trained(llama, recurrent("luong", "dot")), tokenizer=None)
    with pytest.raises(ExportRefused, match="has no tokenizer"):
        export_bundle(model, Target(repository=tmp_path, name="mute", version=1), precision="fp32", report=print)


def test_weights_that_are_no_numbers_are_refused_by_name(llama, tmp_path):
    module = recurrent("luong", "dot")
    with torch.no_grad():
        name, weight = next(iter(module.named_parameters()))
        weight.view(-1)[1:3] = torch.tensor([torch.nan, torch.inf])
    target = Target(repository=tmp_path, name="broken", version=1)
    with pytest.raises(ExportRefused, match=f"{name}: 2 of {weight.numel()} numbers of the checkpoint are not finite"):
        export_bundle(trained(llama, module), target, precision="fp32", report=print)
    assert not (tmp_path / "broken").exists()


def test_predictions_that_are_no_numbers_fail_the_certificate():
    likely, broken = np.full(4, -1.0), np.array([-1.0, np.nan, -1.0, np.nan])
    with pytest.raises(ExportRefused, match="certificate failed: 2 of 4 predictions of a text are NaN"):
        compare_quality(likely, broken, text="a text", bound=0.1)


def test_a_traced_graph_that_differs_from_the_model_is_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(certificate, "PARITY_BOUND", 1e-12)
    target = Target(repository=tmp_path, name="damaged", version=1)
    with pytest.raises(ExportRefused, match=r"certificate failed: .*sources: .*, allowed 1e-12"):
        export_bundle(trained(llama, recurrent("luong", "dot")), target, precision="fp32", report=lambda line: None)
    assert list((tmp_path / "damaged").iterdir()) == []
