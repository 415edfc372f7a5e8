"""Beam search: against enumeration of all targets, against greedy decoding without a cache, alone and in a batch."""

import itertools

import pytest
import torch

from models.beam import BeamSearch, search
from models.decoder import DecoderConfig
from models.encoder import EncoderConfig, StackConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

START, END = 1, 0
SIZES = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24}
VARIANTS = {
    "softmax": {"positions": "rotary"},
    "ring": {"positions": "rotary", "window": 2, "window_state": "ring"},
    "elu": {"positions": "learned", "attention": "elu"},
    "mean": {"positions": "learned", "attention": "mean"},
}


def model_of(variant="softmax", vocab_size=4):
    torch.manual_seed(0)
    encoder = EncoderConfig(
        vocab_size=vocab_size, max_source_len=8, positions="learned", stack=StackConfig(**SIZES)
    )  # fmt: skip
    decoder = DecoderConfig(
        **SIZES, vocab_size=vocab_size, num_kv_heads=1, head_dim=8, max_model_len=12, norm="layer", norm_eps=1e-5,
        activation="gelu", bias="all", tie_embeddings=False, **VARIANTS[variant],
    )  # fmt: skip
    model = EncoderDecoder(EncoderDecoderConfig(encoder=encoder, decoder=decoder)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


def sources(rows, vocab_size=4):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(vocab_size, (rows, 6), generator=generator),
        torch.randint(1, 7, (rows,), generator=generator),
    )


def options(width, max_tokens=4, length_penalty=1.0):
    return BeamSearch(
        width=width, max_tokens=max_tokens, start_token_id=START, end_token_id=END, length_penalty=length_penalty
    )


@torch.no_grad()
def likelihood(model, source, target):
    """The log-likelihood in nats of a whole target, in one pass without any state."""
    inputs = torch.tensor([[START, *target[:-1]]])
    logits = model(source[None], inputs).log_softmax(-1)[0]
    return logits.gather(1, torch.tensor(target)[:, None]).sum().item()


def enumerated(model, source, choice):
    """Every target of at most `max_tokens` tokens with its likelihood and score, the best first."""
    words = [token for token in range(4) if token != END]
    targets = [(*body, END) for size in range(choice.max_tokens) for body in itertools.product(words, repeat=size)]
    targets += itertools.product(words, repeat=choice.max_tokens)  # never ended
    scored = []
    for target in targets:
        total = likelihood(model, source, target)
        body = target[:-1] if target[-1] == END else target
        scored.append((body, total, total / ((5 + len(target)) / 6) ** choice.length_penalty))
    return sorted(scored, key=lambda one: -one[2])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wide_beam_finds_what_enumeration_finds(variant, length_penalty):
    model, (source, lengths) = model_of(variant), sources(2)
    choice = options(width=27, max_tokens=3, length_penalty=length_penalty)  # as wide as there are prefixes
    for row, found in enumerate(search(model, source, lengths, choice)):
        expected = enumerated(model, source[row, : lengths[row]], choice)[: len(found)]
        assert len(found) == 27
        assert [one.token_ids for one in found] == [body for body, _, _ in expected]
        for one, (_, total, score) in zip(found, expected, strict=True):
            assert one.log_likelihood == pytest.approx(total, abs=1e-4)
            assert one.score == pytest.approx(score, abs=1e-4)


def beam_by_hand(model, source, choice):
    """Beam search over lists, every step one pass over whole prefixes; it stops only where no beam is left."""
    beams, finished = [((), 0.0)], []
    for step in range(1, choice.max_tokens + 1):
        grown = []
        for body, total in beams:
            with torch.no_grad():
                logits = model(source[None], torch.tensor([[START, *body]])).log_softmax(-1)[0, -1].tolist()
            grown += [((*body, token), total + value) for token, value in enumerate(logits)]
        grown.sort(key=lambda one: -one[1])
        ended = [one for one in grown[: choice.width] if one[0][-1] == END]
        finished += [(body[:-1], total / choice.penalty(step)) for body, total in ended]
        beams = [one for one in grown if one[0][-1] != END][: choice.width]
    finished += [(body, total / choice.penalty(choice.max_tokens)) for body, total in beams]
    return sorted(finished, key=lambda one: -one[1])[: choice.width]


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_narrow_beam_equals_a_search_over_lists_although_it_stops_early(width, length_penalty):
    model, (source, lengths) = model_of(vocab_size=9), sources(4, 9)
    choice = options(width, max_tokens=8, length_penalty=length_penalty)
    for row, found in enumerate(search(model, source, lengths, choice)):
        expected = beam_by_hand(model, source[row, : lengths[row]], choice)
        assert [one.token_ids for one in found] == [body for body, _ in expected]
        assert [one.score for one in found] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_width_of_one_is_greedy_decoding_without_a_cache(variant):
    model, (source, lengths) = model_of(variant, vocab_size=9), sources(6, 9)
    bodies = []
    for row, length in enumerate(lengths.tolist()):
        body = [START]
        while len(body) < 8:
            logits = model(source[row : row + 1, :length], torch.tensor([body]))
            body.append(int(logits[0, -1].argmax()))
        bodies.append(body[1:])
    for end in {token for body in bodies for token in body}:  # so that some end, and some do not
        choice = BeamSearch(width=1, max_tokens=7, start_token_id=START, end_token_id=end, length_penalty=5.0)
        for (found,), body in zip(search(model, source, lengths, choice), bodies, strict=True):
            assert found.token_ids == tuple(body[: body.index(end)] if end in body else body)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sources_in_a_batch_are_searched_as_if_alone(variant, width):
    model, (source, lengths) = model_of(variant, vocab_size=9), sources(6, 9)
    choice = options(width, max_tokens=9)
    together = search(model, source, lengths, choice)
    for row in range(6):
        (alone,) = search(model, source[row : row + 1, : lengths[row]], None, choice)
        assert [one.token_ids for one in together[row]] == [one.token_ids for one in alone]
        scores = [one.score for one in alone]
        assert [one.score for one in together[row]] == pytest.approx(scores, abs=1e-4)


def test_a_larger_length_penalty_prefers_longer_targets():
    model, (source, lengths) = model_of(vocab_size=9), sources(8, 9)
    sizes = [
        sum(len(found[0].token_ids) for found in search(model, source, lengths, options(6, 10, penalty)))
        for penalty in (0.0, 1.0, 4.0)
    ]
    assert sizes[0] < sizes[-1]
    assert sizes == sorted(sizes)
    assert options(1, length_penalty=0.0).penalty(7) == 1.0
    assert options(1, length_penalty=2.0).penalty(7) == pytest.approx(4.0)


def test_the_encoder_runs_once_and_its_keys_are_made_once():
    model, (source, lengths) = model_of(), sources(3)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    for index, layer in enumerate(model.decoder.layers):
        layer.cross_attention.key.register_forward_hook(lambda *_, index=index: calls.append(f"key {index}"))
    search(model, source, lengths, options(3))
    assert sorted(calls) == ["encoder", "key 0", "key 1"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "width is 0; it must be at least 1"),
        ("max_tokens", 0, "max_tokens is 0; it must be at least 1"),
        ("length_penalty", -1.0, r"length_penalty is -1\.0; it must be at least 0"),
        ("length_penalty", float("nan"), "length_penalty is nan; it must be at least 0"),
    ],
)
def test_a_wrong_option_names_field_value_and_limit(field, value, message):
    fields = {"width": 2, "max_tokens": 4, "start_token_id": START, "end_token_id": END}
    with pytest.raises(ValueError, match=message):
        BeamSearch(**fields | {field: value})
