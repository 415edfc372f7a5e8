"""The captioner: steps equal one pass, padding and neighbours change nothing, searches find the best and read once."""

import pytest
import torch

from models import checkpoint
from models.beam import BeamSearch, search
from models.captioner import Captioner, CaptionerConfig
from models.checkpoint import TrainedModel
from models.decoder import DecoderConfig
from models.encoder import StackConfig
from models.vision import ImageEncoderConfig

START, END, VOCAB_SIZE = 1, 2, 11
NUM_PATCHES, NUM_HEADS, NUM_LAYERS = 6, 2, 2


def captioner(**changes):
    torch.manual_seed(0)
    stack = StackConfig(d_model=24, num_layers=1, num_heads=3, d_ff=32)
    decoder = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "num_layers": NUM_LAYERS,
        "num_heads": NUM_HEADS,
        "num_kv_heads": 1,
        "head_dim": 8,
        "d_ff": 24,
        "max_model_len": 12,
        "positions": "rotary",
        "norm": "rms",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "bias": "none",
        "tie_embeddings": True,
    }
    encoder = ImageEncoderConfig(height=6, width=4, num_channels=1, patch_size=2, stack=stack)
    model = Captioner(CaptionerConfig(encoder=encoder, decoder=DecoderConfig(**decoder | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def images(rows=3, seed=1):
    return torch.randn(rows, 1, 6, 4, generator=torch.Generator().manual_seed(seed))


def captions(rows=3, length=7):
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("attention", ["softmax", "mean"])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 4], [5, 1, 1], [7]])
@torch.inference_mode()
def test_writing_in_steps_equals_one_pass(chunks, attention):
    model, token_ids = captioner(attention=attention), captions()
    state, logits = model.begin(model.encode(images()), capacity=8), []
    for part in token_ids.split(chunks, 1):
        some, state = model.decode(part, state)
        logits.append(some)
    torch.testing.assert_close(torch.cat(logits, 1), model(images(), token_ids), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_that_are_written_unevenly_equal_one_pass():
    model, token_ids = captioner(), captions()
    whole = model(images(), token_ids)
    state = model.begin(model.encode(images()), capacity=8)
    written = torch.zeros(3, dtype=torch.int64)
    for lengths in ([2, 0, 3], [1, 4, 0], [4, 3, 4]):
        chunk = torch.zeros(3, 4, dtype=torch.int64)
        for row, length in enumerate(lengths):
            chunk[row, :length] = token_ids[row, written[row] : written[row] + length]
        logits, state = model.decode(chunk, state, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            expected = whole[row, written[row] : written[row] + length]
            torch.testing.assert_close(logits[row, :length], expected, rtol=1e-5, atol=1e-5)
        written += torch.tensor(lengths)


@torch.inference_mode()
def test_what_pads_an_image_at_the_bottom_changes_no_word():
    model, lengths = captioner(), torch.tensor([4, 6, 2])
    poisoned = images()
    poisoned[0, :, 4:], poisoned[2, :, 2:] = float("nan"), float("inf")
    expected = model(images(), captions(), lengths)
    torch.testing.assert_close(model(poisoned, captions(), lengths), expected)
    state = model.begin(model.encode(poisoned, lengths), lengths, 8)
    torch.testing.assert_close(model.decode(captions(), state)[0], expected, rtol=1e-5, atol=1e-5)
    assert (expected[0] - model(images(), captions())[0]).abs().max() > 1e-3
    for weights in model.attention_weights(images(), captions(), lengths).cross:
        assert weights[0, ..., 4:].abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, NUM_HEADS, 7))


@torch.inference_mode()
def test_an_image_is_captioned_alike_alone_and_in_a_batch():
    model = captioner()
    together = model(images(), captions())
    for row in range(3):
        alone = model(images()[row : row + 1], captions()[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_later_words_change_nothing_before_them_and_the_image_changes_everything():
    model, changed = captioner(), captions()
    changed[:, 4] = 0
    before, after = model(images(), captions()), model(images(), changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax((0, 2)).min() > 1e-4
    other = model(images(seed=3), captions())
    assert (other - before).abs().amax((0, 2)).min() > 1e-3


@torch.inference_mode()
def test_weights_of_all_three_kinds_are_distributions():
    weights = captioner().attention_weights(images(), captions())
    assert [layer.shape for layer in weights.encoder] == [(3, 3, NUM_PATCHES, NUM_PATCHES)]
    assert [layer.shape for layer in weights.decoder] == [(3, NUM_HEADS, 7, 7)] * NUM_LAYERS
    assert [layer.shape for layer in weights.cross] == [(3, NUM_HEADS, 7, NUM_PATCHES)] * NUM_LAYERS
    for layer in (*weights.encoder, *weights.decoder, *weights.cross):
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:-1]))


@torch.inference_mode()
def test_a_narrow_search_is_greedy_and_reads_the_image_once():
    model, reads = captioner(), []
    for layer in model.decoder.layers:
        layer.cross_attention.key.register_forward_hook(lambda *_: reads.append("keys"))
    model.encoder.register_forward_hook(lambda *_: reads.append("image"))
    options = BeamSearch(width=1, max_tokens=9, start_token_id=START, end_token_id=END)
    found = search(model, images(), None, options)
    assert reads == ["image"] + ["keys"] * NUM_LAYERS
    for row in range(3):
        token_ids = [START]
        while len(token_ids) <= 9:
            token = int(model(images()[row : row + 1], torch.tensor([token_ids]))[0, -1].argmax())
            if token == END:
                break
            token_ids.append(token)
        assert found[row][0].token_ids == tuple(token_ids[1:])


@torch.inference_mode()
def test_a_wide_search_finds_likelier_captions_and_scores_them_truly():
    model = captioner()
    options = {"max_tokens": 6, "start_token_id": START, "end_token_id": END, "length_penalty": 0.0}
    narrow, wide = (search(model, images(), None, BeamSearch(width=width, **options)) for width in (1, 8))
    for row in range(3):
        assert wide[row][0].log_likelihood >= narrow[row][0].log_likelihood - 1e-5
        for one in wide[row]:
            target = torch.tensor([*one.token_ids, END])[: options["max_tokens"]]
            inputs = torch.tensor([[START, *one.token_ids]])[:, : len(target)]
            likelihood = model(images()[row : row + 1], inputs)[0].log_softmax(-1)
            expected = likelihood.gather(1, target[:, None]).sum().item()
            assert one.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_brings_the_captioner_back_with_its_tie(tmp_path):
    trained = TrainedModel(module=captioner(), tokenizer=None, source="a test", licence="Apache-2.0")
    checkpoint.save(trained, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model").module
    assert loaded.config == trained.module.config
    assert loaded.decoder.lm_head.weight is loaded.decoder.token_embedding.weight
    assert torch.equal(loaded(images(), captions()), trained.module(images(), captions()))
