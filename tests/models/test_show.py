"""`python -m models show`: where models of every family look, named by tokens and patches, and masked as they see."""

import io
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attendant.heatmap import entropy_nats
from models import checkpoint, show
from models.__main__ import main
from models.beam import BeamSearch, search
from models.captioner import Captioner, CaptionerConfig
from models.checkpoint import TokenizerInfo, TrainedModel
from models.classifier import Classifier, ClassifierConfig, Tagger
from models.decoder import Decoder, DecoderConfig
from models.encoder import Encoder, EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.examples import Example, patch_names, picture
from models.families import FAMILIES
from models.hard_vision import HardVision, HardVisionConfig
from models.masked_lm import MaskedLanguageModel
from models.recurrent import Recurrent, RecurrentConfig
from models.token_texts import token_texts
from models.training.characters import character_tokenizer, tokenizer_info, word_tokenizer
from models.training.pairs import END, START
from models.vision import ImageEncoderConfig, VisionTransformer, VisionTransformerConfig

LETTERS = character_tokenizer(["abcdefgh "])
WORDS = word_tokenizer(["one two three four"])
CHECKPOINTS = sorted(path.parent for path in (Path(show.__file__).parent / "checkpoints").glob("*/config.json"))
EXAMPLES = {  # of committed checkpoints, by recipe
    "dates": {"text": "3 march 2021"},
    "g2p": {"text": "attention"},
    "digits": {"image": 3},
    "caption": {"image": 3},
    "needle": {"text": "0 17 18 1 20"},
    "sequences": {"text": "abcdef"},
}


def byte_level_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|end of text|>", *alphabet, "Ġt", "Ġth"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("Ġt", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_level_tokenizer()


def stack(**changes):
    return StackConfig(**{"d_model": 16, "num_layers": 2, "num_heads": 4, "d_ff": 16} | changes)


def decoder_config(tokenizer=WORDS, **changes):
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 16}
    choices = {"positions": "rotary", "norm": "rms", "norm_eps": 1e-5, "activation": "swiglu", "bias": "none"}
    limits = {"vocab_size": tokenizer.get_vocab_size(), "max_model_len": 16, "tie_embeddings": True}
    return DecoderConfig(**sizes | choices | limits | changes)


def encoder_config(**changes):
    size = LETTERS.get_vocab_size()
    return EncoderConfig(vocab_size=size, max_source_len=16, positions="learned", stack=stack(**changes))


def image_config(size, patch_size=4):
    return ImageEncoderConfig(height=size, width=size, num_channels=1, patch_size=patch_size, stack=stack())


def vision_config():
    return VisionTransformerConfig(encoder=image_config(8), num_classes=10)


def recurrent_config(**changes):
    sizes = {"d_embedding": 8, "d_encoder": 8, "d_decoder": 16, "max_source_len": 16, "max_model_len": 16}
    vocabularies = {"source_vocab_size": LETTERS.get_vocab_size(), "vocab_size": WORDS.get_vocab_size()}
    return RecurrentConfig(**sizes | vocabularies | {"decoder": "luong", "attention": "general"} | changes)


def trained(module_class, config, *, tokenizer=WORDS, source=None, add_bos=False):
    """A random model; its weights are large enough that heads differ."""
    torch.manual_seed(0)
    module = module_class(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    module.tie()
    info = None if tokenizer is None else tokenizer_info(tokenizer)
    if add_bos:
        info = TokenizerInfo(json=tokenizer.to_str(), bos_token_id=0, eos_token_ids=(0,), pad_token_id=None,
                             add_bos=True, chat_template=None)  # fmt: skip
    source = None if source is None else tokenizer_info(source)
    return TrainedModel(module=module, tokenizer=info, source_tokenizer=source, source="random", licence="CC0-1.0")


def sheets():
    """One sheet of every family and mask: name, model, example, and how many layers of how many heads it has."""
    text, pair = Example(text="abcde fgh"), Example(text="abc", target="one two")
    translator = EncoderDecoderConfig(encoder=encoder_config(), decoder=decoder_config())
    captioner = CaptionerConfig(encoder=image_config(16, 8), decoder=decoder_config())
    hard = HardVisionConfig(rows=3, columns=3, glance_size=2, d_glance=4, patch=vision_config())
    letters, both = {"tokenizer": LETTERS}, {"source": LETTERS}
    yield "decoder", trained(Decoder, decoder_config(LETTERS), **letters), text, (2, 4)
    yield "window", trained(Decoder, decoder_config(LETTERS, window=3), **letters), text, (2, 4)
    yield (
        "mean",
        trained(Decoder, decoder_config(LETTERS, attention="mean", positions="learned"), **letters),
        text,
        (2, 1),
    )
    yield "encoder", trained(Encoder, encoder_config(), **letters), text, (2, 4)
    yield "near", trained(Encoder, encoder_config(window=3), **letters), text, (2, 4)
    yield "longformer", trained(Encoder, encoder_config(attention="longformer", window=4), **letters), text, (2, 4)
    yield "masked-lm", trained(MaskedLanguageModel, encoder_config(), **letters), text, (2, 4)
    for name, head in (("classifier", Classifier), ("tagger", Tagger)):
        yield name, trained(head, ClassifierConfig(encoder=encoder_config(), num_classes=3), **letters), text, (2, 4)
    yield "encoder-decoder", trained(EncoderDecoder, translator, **both), pair, (6, 4)
    yield "recurrent", trained(Recurrent, recurrent_config(), **both), pair, (1, 1)
    yield "vision-transformer", trained(VisionTransformer, vision_config(), tokenizer=None), Example(image=3), (2, 4)
    yield "hard-attention", trained(HardVision, hard, tokenizer=None), Example(image=3), (1, 1)
    yield "captioner", trained(Captioner, captioner), Example(image=3, target="one two"), (6, 4)


CASES = {name: rest for name, *rest in sheets()}


def test_every_family_is_shown():
    shown = {type(model.module) for model, *_ in CASES.values()}
    assert shown == set(FAMILIES.values())


@pytest.mark.parametrize("name", CASES)
def test_rows_sum_to_1_and_exactly_what_may_be_seen_has_weight(name):
    model, example, shape = CASES[name]
    sheet = show.attention(model, example)
    assert (len(sheet.layers), {len(layer.heads) for layer in sheet.layers}) == (shape[0], {shape[1]})
    for layer in sheet.layers:
        for head in layer.heads:
            assert head.sums == pytest.approx([1.0] * len(head.rows), abs=1e-5)
            for t, row in enumerate(head.weights):
                seen = [weight > 0 for weight in row]
                assert seen == [head.allows(t, s) for s in range(len(row))], (layer.title, head.title, t)


def test_masks_are_those_of_the_mechanisms():
    def allowed(name):
        model, example, _ = CASES[name]
        head = show.attention(model, example).layers[0].heads[0]
        return torch.tensor([[head.allows(t, s) for s in range(len(head.columns))] for t in range(len(head.rows))])

    place = torch.arange(9)
    behind = place[:, None] - place
    assert torch.equal(allowed("decoder"), behind >= 0)
    assert torch.equal(allowed("window"), (behind >= 0) & (behind < 3))
    assert torch.equal(allowed("encoder"), torch.ones(9, 9, dtype=torch.bool))
    assert torch.equal(allowed("near"), behind.abs() < 3)
    assert torch.equal(allowed("longformer"), (behind.abs() <= 2) | (place == 0) | (place == 0)[:, None])


def test_weights_and_names_are_the_models_own():
    model, example, _ = CASES["encoder-decoder"]
    source, target = torch.tensor([LETTERS.encode("abc").ids]), torch.tensor([[1, *WORDS.encode("one two").ids]])
    weights = model.module.attention_weights(source, target)
    layers = show.attention(model, example).layers
    expected = [*weights.encoder, *weights.decoder, *weights.cross]
    assert [layer.title for layer in layers] == [
        f"{kind}, layer {index}"
        for kind in ("encoder self-attention", "decoder self-attention", "cross-attention of each token written")
        for index in (0, 1)
    ]
    for layer, tensor in zip(layers, expected, strict=True):
        for place, head in enumerate(layer.heads):
            assert head.title == f"head {place}"
            assert head.weights == tuple(map(tuple, tensor[0, place].tolist()))
    read, written = ("<s>", "one", "two"), ("one", "two", "</s>")
    names = [(layer.heads[0].rows, layer.heads[0].columns) for layer in layers[::2]]
    assert names == [(("a", "b", "c"),) * 2, (read, read), (written, ("a", "b", "c"))]


@pytest.mark.parametrize("name", ["recurrent", "encoder-decoder", "captioner"])
def test_without_a_target_the_model_writes_what_a_beam_search_finds(name):
    model, example, _ = CASES[name]
    source = picture(3, 16, 16) if example.text is None else torch.tensor([LETTERS.encode(example.text).ids])
    options = BeamSearch(width=5, max_tokens=15, start_token_id=START, end_token_id=END)
    best = search(model.module, source, None, options)[0][0]
    own = show.attention(model, Example(text=example.text, image=example.image))
    assert own.layers[-1].heads[0].rows == (*token_texts(WORDS, best.token_ids), "</s>")


def test_an_empty_target_is_one():
    model, example, _ = CASES["encoder-decoder"]
    sheet = show.attention(model, Example(text=example.text, target=""))
    assert [(layer.heads[0].rows, layer.heads[0].columns) for layer in sheet.layers[3::2]] == [
        (("<s>",), ("<s>",)),
        (("</s>",), ("a", "b", "c")),
    ]


def test_a_beginning_of_text_is_read_where_the_model_expects_one():
    model = trained(Decoder, decoder_config(BYTES), tokenizer=BYTES, add_bos=True)
    head = show.attention(model, Example(text="a the\u00e9")).layers[0].heads[0]
    assert head.rows == ("<|end of text|>", "a", " th", "e", "\\xc3", "\\xa9")


def test_patches_are_named_like_the_cells_of_a_spreadsheet():
    model, example, _ = CASES["vision-transformer"]
    assert show.attention(model, example).layers[0].heads[0].rows == ("class", "A1", "B1", "A2", "B2")
    model, example, _ = CASES["hard-attention"]
    assert show.attention(model, example).layers[0].heads[0].columns[:4] == ("A1", "B1", "C1", "A2")
    assert patch_names(2, 27)[26:28] == ["1,27", "2,1"]


def test_a_checkpoint_without_a_tokenizer_is_given_token_ids():
    model = trained(Encoder, encoder_config(), tokenizer=None)
    assert show.attention(model, Example(text="0 3 2")).layers[0].heads[0].rows == ("0", "3", "2")
    with pytest.raises(ValueError, match="no tokenizer; give token ids"):
        show.attention(model, Example(text="zero"))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text())
def test_texts_of_byte_level_tokens_make_the_text_again(text):
    tokens = token_texts(BYTES, BYTES.encode(text).ids)
    spelt = "".join(token.encode("unicode_escape").decode() if "\\x" not in token else token for token in tokens)
    whole = re.sub(r"(?:\\x[89a-f][0-9a-f])+", lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode(), spelt)
    if "\\" not in text:  # which a token cannot tell from the spelling of a byte
        assert whole == "".join(c if ord(c) > 0x7F else c.encode("unicode_escape").decode() for c in text)


def test_tokens_of_other_tokenizers_are_as_they_are_spelt():
    assert token_texts(WORDS, [1, 3, 99]) == ["<s>", WORDS.id_to_token(3), "<99>"]


# What is refused.


@pytest.mark.parametrize("attention", ["favor", "elu"])
def test_linear_attention_is_refused_and_told_what_has_weights(attention):
    model = trained(Decoder, decoder_config(LETTERS, attention=attention), tokenizer=LETTERS)
    with pytest.raises(ValueError, match="linear attention computes no weights; ask a model with attention 'softmax'"):
        show.attention(model, Example(text="abc"))


@pytest.mark.parametrize(
    ("name", "example", "message"),
    [
        ("decoder", Example(text="abc", target="d"), "--target is given; this model takes --text"),
        ("encoder", Example(image=1), "--text is missing; this model reads texts"),
        ("recurrent", Example(text="abc", image=1), "--image is given; this model takes --text and --target"),
        ("vision-transformer", Example(text="abc"), "--image is missing; this model reads images"),
        ("vision-transformer", Example(image=397), "no test picture 397; they are numbered from 0 to 396"),
        ("captioner", Example(image=-1), "no test picture -1; they are numbered from 0 to 999"),
        ("decoder", Example(text=""), "the text '' has no tokens; give a longer one"),
        ("decoder", Example(text="a" * 17), "token_ids has 17 tokens; max_model_len is 16"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(name, example, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        show.attention(CASES[name][0], example)


def test_too_many_weights_are_refused(monkeypatch):
    monkeypatch.setattr(show, "MAX_CELLS", 9 * 9 * 8 - 1)
    with pytest.raises(ValueError, match="self-attention has 648 weights; at most 647 are shown: give a shorter text"):
        show.attention(*CASES["decoder"][:2])


# The command line.


@pytest.fixture
def decoder_directory(tmp_path):
    checkpoint.save(CASES["decoder"][0], tmp_path / "decoder")
    return tmp_path / "decoder"


def test_the_command_prints_the_entropy_of_every_head(decoder_directory, capsys):
    assert main(["show", str(decoder_directory), "--text", "abcdefgh"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["ATTENTION", "HEAD", "ENTROPY", "(NATS)", "MAXIMUM", "SHARE"]
    model = checkpoint.load(decoder_directory)
    weights, _ = model.module.attention_weights(torch.tensor([LETTERS.encode("abcdefgh").ids]))
    maximum = math.log(math.factorial(8)) / 8
    expected = []
    for index, layer in enumerate(weights):
        for place, head in enumerate(layer[0].tolist()):
            mean = sum(map(entropy_nats, head)) / 8
            expected.append(
                f"self-attention, layer {index} head {place} {mean:.3f} {maximum:.3f} {mean / maximum:.0%}".split()
            )
    assert [line.split() for line in lines] == expected


def test_the_command_draws_on_request(decoder_directory, tmp_path, capsys):
    pictures, page = tmp_path / "made" / "png", tmp_path / "page.html"
    arguments = ["--terminal", "--png", str(pictures), "--html", str(page)]
    assert main(["show", str(decoder_directory), "--text", "a b", *arguments]) == 0
    output = capsys.readouterr().out
    names = ["00-self-attention-layer-0.png", "01-self-attention-layer-1.png"]
    assert [path.name for path in sorted(pictures.iterdir())] == names
    assert output.splitlines()[-3:] == [*(str(pictures / name) for name in names), str(page)]
    assert output.isascii()
    assert "\n  a _ b\na @@//// 0.00 / 0.00\n" in output
    assert Image.open(io.BytesIO((pictures / names[0]).read_bytes())).format == "PNG"
    html = page.read_text(encoding="utf-8")
    assert "decoder: a b</title>" in html
    assert html.count("<caption>head ") == 8


def test_the_command_shows_some_layers_alone(decoder_directory, capsys):
    arguments = ["show", str(decoder_directory), "--text", "a b"]
    assert main([*arguments, "--layer", "1"]) == 0
    assert {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]} == {"1"}
    assert main([*arguments, "--layer", "2"]) == 1
    assert capsys.readouterr().err == "error: --layer is 2; there are 0 to 1\n"


@pytest.mark.parametrize(
    "option", [["--terminal"], ["--layer", "0"], ["--html", "x.html"], ["--png", "x"], ["--target", "x"]]
)
def test_drawing_needs_an_example(decoder_directory, option, capsys):
    assert main(["show", str(decoder_directory), *option]) == 1
    assert capsys.readouterr().err == f"error: {option[0]} is about an example; give one with --text or --image\n"


@pytest.mark.parametrize("name", CASES)
def test_every_family_is_described(name):
    lines = dict(line.split(maxsplit=1) for line in show.description(CASES[name][0]) if not line.startswith("state "))
    assert lines["source"] == "random"
    assert int(lines["parameters"].replace(",", "")) == sum(one.numel() for one in CASES[name][0].module.parameters())
    assert ("states" in lines) == bool(CASES[name][0].module.state_specs())


@pytest.mark.parametrize("directory", CHECKPOINTS, ids=lambda path: path.name)
def test_committed_checkpoints_show_where_they_look(directory):
    model = checkpoint.load(directory)
    example = Example(
        **EXAMPLES.get((model.recipe or "").partition("-")[0], {"text": "The state of the Union is strong."})
    )
    if getattr(model.module.config, "attention", "softmax") in ("favor", "elu"):
        with pytest.raises(ValueError, match="linear attention computes no weights"):
            show.attention(model, example)
        return
    for layer in show.attention(model, example).layers:
        for head in layer.heads:
            assert head.sums == pytest.approx([1.0] * len(head.rows), abs=1e-4)
            assert 0.0 <= head.mean_entropy <= head.mean_maximum + 1e-9
