"""Attention weights over the wire, against the PyTorch models that were exported."""

import asyncio
import json
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attendant import AsyncClient, Client, Delta
from attendant.cli import main
from attendant.v1 import explain_pb2 as pb
from attendant.v1 import generation_pb2
from export.bundle import Target, export_bundle
from models.attention.functional import entropy
from models.captioner import Captioner, CaptionerConfig
from models.checkpoint import TokenizerInfo, TrainedModel
from models.decoder import Decoder, DecoderConfig
from models.encoder import EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.hard_vision import HardVision, HardVisionConfig
from models.recurrent import Recurrent, RecurrentConfig
from models.vision import ImageEncoderConfig, VisionTransformer, VisionTransformerConfig

TOKENS, START, END = 32, 256, 257
VOCABULARY = 258
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


IMAGE = ImageEncoderConfig(height=8, width=12, num_channels=1, patch_size=4, stack=StackConfig(**STACK))
PATCH = VisionTransformerConfig(encoder=IMAGE, num_classes=3)


def byte_tokenizer() -> TokenizerInfo:
    """Bytes, and two tokens that begin and end an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<start>", "<end>"])
    return TokenizerInfo(
        json=tokenizer.to_str(),
        bos_token_id=START,
        eos_token_ids=(END,),
        pad_token_id=None,
        add_bos=False,
        chat_template=None,
    )


def modules() -> dict[str, torch.nn.Module]:
    encoder = EncoderConfig(
        vocab_size=VOCABULARY, max_source_len=TOKENS, positions="learned", stack=StackConfig(**STACK)
    )
    decoder = DecoderConfig(**DECODER, positions="sinusoidal")
    recurrent = RecurrentConfig(
        source_vocab_size=VOCABULARY,
        vocab_size=VOCABULARY,
        max_source_len=TOKENS,
        max_model_len=16,
        d_embedding=12,
        d_encoder=8,
        d_decoder=16,
        decoder="bahdanau",
        attention="additive",
    )
    return {
        "writer": Decoder(DecoderConfig(**DECODER, positions="rotary", window=6)),
        "translator": EncoderDecoder(EncoderDecoderConfig(encoder=encoder, decoder=decoder)),
        "aligner": Recurrent(recurrent),
        "describer": Captioner(CaptionerConfig(encoder=IMAGE, decoder=decoder)),
        "seer": VisionTransformer(PATCH),
        "glancer": HardVision(HardVisionConfig(rows=2, columns=3, glance_size=2, d_glance=4, patch=PATCH)),
    }


@pytest.fixture(scope="module")
def trained(tiny_encoder) -> dict[str, TrainedModel]:
    torch.manual_seed(5)
    found = {"reader": tiny_encoder}
    for name, module in modules().items():
        module.requires_grad_(False)
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        found[name] = TrainedModel(
            module=module.eval(),
            tokenizer=None if name in ("seer", "glancer") else byte_tokenizer(),
            labels=("one", "two", "three") if name in ("seer", "glancer") else None,
            source="random weights",
            licence="Apache-2.0",
            recipe="none",
            data="none",
        )
    return found


@pytest.fixture(scope="module")
def serve(module_start, trained, tmp_path_factory):
    """Export some of the models, with explain graphs, and serve them."""

    def serve(*names: str):
        repository = tmp_path_factory.mktemp("explained")
        for name in names:
            target = Target(repository=repository, name=name, version=1)
            export_bundle(trained[name], target, precision="fp32", explain=True, report=lambda line: None)
        return module_start(repository=repository).wait_ready()

    return serve


@pytest.fixture(scope="module")
def explaining(serve):
    return serve("writer", "reader")


@pytest.fixture(scope="module")
def client(explaining):
    with Client(f"127.0.0.1:{explaining.port}") as client:
        yield client


@pytest.fixture(scope="module")
def about_sources(serve):
    with Client(f"127.0.0.1:{serve('translator', 'aligner').port}") as client:
        yield client


def assert_is(layer, expected: torch.Tensor) -> None:
    """Compare a layer with the model's weights (1, H, T, S)."""
    assert [head.head for head in layer.heads] == list(range(expected.shape[1]))
    for head, theirs in zip(layer.heads, expected[0], strict=True):
        ours = np.array(head.weights)
        assert ours.shape == tuple(theirs.shape) == (len(layer.rows), len(layer.columns))
        assert np.abs(ours - theirs.detach().numpy()).max() <= 1e-5
        assert np.abs(ours.sum(1) - 1).max() <= 1e-5
        assert np.abs(np.array(head.entropies) - entropy(theirs).detach().numpy()).max() <= 1e-4


def test_a_decoders_weights_are_the_models_and_0_where_it_cannot_look(client, trained):
    text = "grüße!"
    found = client.explain(text, model="writer")
    token_ids = client.tokenize(text, model="writer").token_ids
    expected, _ = trained["writer"].module.attention_weights(torch.tensor([token_ids]))
    assert [(layer.kind, layer.layer, layer.left, layer.right) for layer in found.layers] == [
        ("self", 0, 5, 0),
        ("self", 1, 5, 0),
    ]
    for layer, weights in zip(found.layers, expected, strict=True):
        assert_is(layer, weights)
        for head in layer.heads:
            for row, cells in enumerate(head.weights):
                assert all(cells[column] == 0 for column in range(len(cells)) if not row - 5 <= column <= row)
    assert found.layers[0].rows == ("g", "r", "\\xc3", "\\xbc", "\\xc3", "\\x9f", "e", "!")


def test_an_encoders_weights_are_the_models_special_tokens_included(client, trained):
    found = client.explain("We the people", model="reader")
    encoded = Tokenizer.from_str(trained["reader"].tokenizer.json).encode("We the people")
    assert found.model == "reader/1"
    for layer, weights in zip(
        found.layers, trained["reader"].module.attention_weights(torch.tensor([encoded.ids])), strict=True
    ):
        assert layer.rows == layer.columns == tuple(encoded.tokens)
        assert_is(layer, weights)


@pytest.mark.slow
def test_all_kinds_of_an_encoder_decoder_with_the_target_that_is_given(about_sources, trained):
    found = about_sources.explain("source", target="goal", model="translator")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {name: [alphabet.index(character) for character in name] for name in ("source", "goal")}
    assert found.target_ids == (*ids["goal"], END)
    weights = trained["translator"].module.attention_weights(
        torch.tensor([ids["source"]]), torch.tensor([[START, *ids["goal"]]])
    )
    by_kind = {
        kind: [layer for layer in found.layers if layer.kind == kind] for kind in ("encoder", "decoder", "cross")
    }
    for kind, layers in by_kind.items():
        for layer, expected in zip(layers, getattr(weights, kind), strict=True):
            assert_is(layer, expected)
    cross, decoder = by_kind["cross"][0], by_kind["decoder"][0]
    assert cross.rows == (*"goal", "<end>")
    assert cross.columns == tuple("source")
    assert decoder.rows == ("<start>", *"goal")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["translator", "aligner"])
def test_without_a_target_a_model_explains_its_own_greedy_answer(about_sources, model):
    answer = about_sources.generate("source", model=model, temperature=0).result()
    found = about_sources.explain("source", model=model)
    assert found.target_ids == answer.token_ids
    again = about_sources.explain("source", model=model, target_ids=answer.token_ids)
    assert again == found


@pytest.mark.slow
@pytest.mark.parametrize("model", ["translator", "aligner"])
def test_an_answer_brings_the_alignment_of_each_token(about_sources, model):
    stream = about_sources.generate("source", model=model, alignment=True, max_tokens=9, seed=3)
    deltas = [event for event in stream.events() if isinstance(event, Delta)]
    answer = stream.result()
    assert answer.started.source_labels == tuple("source")
    assert all(len(delta.alignment) == len(delta.token_ids) for delta in deltas)
    told = about_sources.explain("source", target_ids=answer.token_ids, model=model)
    shown = [head.weights for layer in told.layers if layer.rows == tuple(_labels(told)) for head in layer.heads]
    expected = np.mean(shown, axis=0)
    assert expected.shape == (len(answer.token_ids), 6)
    assert np.abs(np.array(answer.alignment) - expected).max() <= 1e-5
    plain = about_sources.generate("source", model=model, max_tokens=9, seed=3).result()
    assert (plain.token_ids, plain.alignment) == (answer.token_ids, ())


def _labels(told):
    """What was written, as the layers name it that look at the source."""
    return next(layer.rows for layer in told.layers if layer.columns == tuple("source") != layer.rows)


def test_alignment_needs_a_model_that_looks_at_a_source(explaining, refusal_of):
    output = generation_pb2.OutputOptions(alignment=True)
    refusal = refusal_of(lambda: list(explaining.generate("writer", prompt="a", output=output)))
    assert (refusal.code.name, refusal.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")


@pytest.mark.slow
def test_a_recurrent_models_additive_attention_for_any_length(about_sources, trained):
    source_ids = about_sources.tokenize("tokens", model="aligner").token_ids
    for count in (1, 5, 16):
        target_ids = [65 + index for index in range(count)]
        found = about_sources.explain(token_ids=source_ids, target_ids=target_ids, model="aligner")
        (expected,) = (
            trained["aligner"]
            .module.attention_weights(torch.tensor([source_ids]), torch.tensor([[START, *target_ids[:-1]]]))
            .cross
        )
        (layer,) = found.layers
        assert layer.kind == "additive"
        assert_is(layer, expected)


@pytest.fixture(scope="module")
def about_images(serve):
    with Client(f"127.0.0.1:{serve('seer', 'glancer', 'describer').port}") as client:
        yield client


def picture(height: int, width: int) -> tuple[bytes, torch.Tensor]:
    """A PNG of random grey, and the values (1, 1, Y, X) that it stands for."""
    grey = np.random.default_rng(height).integers(0, 256, (height, width), np.uint8)
    file = BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue(), torch.from_numpy(grey)[None, None].float() / 255


@pytest.mark.slow
def test_a_vision_transformer_looks_at_patches_and_its_class_token(about_images, trained):
    content, values = picture(8, 12)
    found = about_images.explain(image=content, model="seer")
    for layer, weights in zip(found.layers, trained["seer"].module.attention_weights(values), strict=True):
        assert layer.rows == layer.columns == ("class", "A1", "B1", "C1", "A2", "B2", "C2")
        assert_is(layer, weights)


@pytest.mark.slow
def test_hard_attention_shows_where_it_chooses_to_look(about_images, trained):
    content, values = picture(16, 36)
    (layer,) = about_images.explain(image=content, model="glancer").layers
    assert (layer.kind, layer.rows, layer.columns) == ("hard", ("glance",), ("A1", "B1", "C1", "A2", "B2", "C2"))
    assert_is(layer, trained["glancer"].module.attention_weights(values)[:, None, None])


@pytest.mark.slow
def test_a_captioner_shows_which_patch_each_token_comes_from(about_images, trained):
    content, values = picture(8, 12)
    found = about_images.explain(image=content, model="describer")
    answer = about_images.generate(image=content, model="describer", temperature=0, alignment=True).result()
    assert answer.token_ids == found.target_ids
    weights = trained["describer"].module.attention_weights(values, torch.tensor([[START, *found.target_ids[:-1]]]))
    cross = [layer for layer in found.layers if layer.kind == "cross"]
    for layer, expected in zip(cross, weights.cross, strict=True):
        assert layer.columns == answer.started.source_labels == ("A1", "B1", "C1", "A2", "B2", "C2")
        assert_is(layer, expected)
    mean = torch.cat(weights.cross).mean((0, 1)).numpy()
    assert np.abs(np.array(answer.alignment) - mean).max() <= 1e-5


def test_layers_heads_and_kinds_can_be_chosen(client):
    whole = client.explain("some text", model="writer")
    part = client.explain("some text", model="writer", kinds=["self"], layers=[1], heads=[0, 2])
    (layer,) = part.layers
    assert (layer.kind, layer.layer, [head.head for head in layer.heads]) == ("self", 1, [0, 2])
    assert layer.heads == (whole.layers[1].heads[0], whole.layers[1].heads[2])


def test_entropies_come_alone_if_asked_for(client):
    whole = client.explain("some text", model="reader")
    alone = client.explain("some text", model="reader", entropy_only=True)
    for layer, other in zip(whole.layers, alone.layers, strict=True):
        for head, without in zip(layer.heads, other.heads, strict=True):
            assert without.entropies == head.entropies
            assert without.weights == ()


async def test_the_asyncio_client_gets_the_same(client, explaining):
    async with AsyncClient(f"127.0.0.1:{explaining.port}") as other:
        first, second = await asyncio.gather(
            other.explain("some text", model="reader"), other.explain("another", model="reader")
        )
    assert first == client.explain("some text", model="reader")
    assert second == client.explain("another", model="reader")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kinds": ["cross"]}, "kinds[0]"),
        ({"layers": [2]}, "layers[0]"),
        ({"heads": [-1]}, "heads[0]"),
        ({"target_text": "b"}, "target_text"),
        ({"text": ""}, "text"),
        ({"token_ids": generation_pb2.TokenIds()}, "token_ids"),
        ({"token_ids": generation_pb2.TokenIds(ids=[VOCABULARY])}, "token_ids.ids[0]"),
        ({"image": {"encoded": b"x"}}, "input"),
    ],
)
def test_what_cannot_be_explained_is_refused_by_its_field(explaining, refusal_of, fields, field):
    request = pb.ExplainRequest(**({"model": "writer", "text": "a"} | fields))
    refusal = refusal_of(lambda: list(explaining.inference.Explain(request)))
    assert (refusal.code.name, refusal.field) == ("INVALID_ARGUMENT", field)


def test_too_long_a_text_and_a_bundle_without_the_graph_are_refused(explaining, server, refusal_of):
    long = refusal_of(lambda: list(explaining.inference.Explain(pb.ExplainRequest(model="writer", text="a" * 33))))
    assert (long.code.name, long.reason) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
    mute = refusal_of(lambda: list(server.inference.Explain(pb.ExplainRequest(model="tiny-fp32", text="a"))))
    assert (mute.code.name, mute.reason) == ("UNIMPLEMENTED", "UNSUPPORTED")
    assert "--explain" in mute.message


def test_calls_are_counted(explaining, client, eventually):
    before = explaining.value("attendant_requests_total", task="explain", code="OK")
    client.explain("some text", model="reader")
    eventually(lambda: explaining.value("attendant_requests_total", task="explain", code="OK") == before + 1)


def run_cli(server, *arguments: str) -> int:
    return main(["explain", *arguments, "--server", f"127.0.0.1:{server.port}"])


def test_the_command_draws_in_the_terminal(explaining, capsys):
    assert run_cli(explaining, "abc", "--model", "writer", "--layer", "1", "--head", "3") == 0
    out = capsys.readouterr().out
    assert "self-attention, layer 1  head 3" in out
    assert "head 3: mean entropy" in out
    assert "//" in out  # what a causal mask hides
    assert run_cli(explaining, "abc", "--model", "writer") == 0
    printed = capsys.readouterr()
    assert "mean entropy" not in printed.out
    assert "8 heat maps" in printed.err


def test_the_command_writes_pictures_and_a_page(explaining, capsys, tmp_path):
    page = tmp_path / "page.html"
    options = ("--model", "writer", "--png", str(tmp_path / "png"), "--html", str(page))
    assert run_cli(explaining, "abc", *options) == 0
    pictures = sorted((tmp_path / "png").iterdir())
    assert len(pictures) == 2
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", content[16:24])) > 100
    assert "self-attention, layer 1" in page.read_text("utf-8")
    assert str(page) in capsys.readouterr().out


def test_the_command_prints_json(explaining, capsys):
    assert run_cli(explaining, "abc", "--model", "writer", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "writer/1"
    assert len(told["layers"][1]["heads"][0]["weights"]) == 3


@pytest.mark.slow
def test_a_graph_that_does_not_repeat_its_golden_run_shows_nothing_and_harms_nothing(
    start, refusal_of, trained, tmp_path
):
    target = Target(repository=tmp_path / "damaged", name="reader", version=1)
    export_bundle(trained["reader"], target, precision="fp32", explain=True, report=lambda line: None)
    _falsify(target.directory)
    server = start(repository=tmp_path / "damaged").wait_ready()
    refusal = refusal_of(lambda: list(server.inference.Explain(pb.ExplainRequest(model="reader", text="a"))))
    assert (refusal.code.name, refusal.reason) == ("INTERNAL", "EXECUTION_FAILED")
    assert "golden replay" in refusal.message
    with Client(f"127.0.0.1:{server.port}") as client:
        assert len(client.embed("a", model="reader")) == 1


LET_GO = """
import sys, time
from pathlib import Path
import numpy as np
from attendant.bundle import Role
from service.bundle import scan
from service.engine.explain_graph import ExplainGraph
from service.engine.runtime import use_threads

use_threads(1)
(found,) = scan(Path(sys.argv[1]))
graph, given = ExplainGraph(found, idle_seconds=0.2), {Role.TOKEN_IDS: np.arange(5)}
assert not graph.is_loaded
first = graph.run(given)
assert graph.is_loaded
deadline = time.monotonic() + 60
while graph.is_loaded:
    assert time.monotonic() < deadline
again = graph.run(given)
assert all(np.array_equal(first[name], again[name]) for name in first)
print("as before")
"""


@pytest.mark.slow
def test_a_graph_that_nobody_asks_for_is_let_go_and_loaded_again(trained, tmp_path):
    target = Target(repository=tmp_path, name="reader", version=1)
    export_bundle(trained["reader"], target, precision="fp32", explain=True, report=lambda line: None)
    done = subprocess.run([sys.executable, "-c", LET_GO, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("as before\n", "")


def _falsify(directory: Path) -> None:
    """Change what the golden run says of the explain graph, and the hashes with it."""
    from attendant.bundle import file_sha256

    golden = directory / "golden.npz"
    with np.load(golden) as file:
        arrays = dict(file)
    arrays["explain.self.0"] = arrays["explain.self.0"] + 0.01
    np.savez(golden, **arrays)
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    for listed in manifest["files"]:
        if listed["name"] == golden.name:
            listed |= {"bytes": golden.stat().st_size, "sha256": file_sha256(golden)}
    (directory / "manifest.json").write_text(json.dumps(manifest), "utf-8")
