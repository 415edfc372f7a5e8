"""The recurrent encoder-decoder: its equations, its states, and what padding and neighbours must not change."""

import math

import pytest
import torch
from torch import nn

from models import checkpoint
from models.attention.normalizers import NORMALIZERS
from models.attention.scores import SCORES
from models.beam import BeamSearch, search
from models.checkpoint import TrainedModel
from models.families import family_of
from models.recurrent import Recurrent, RecurrentConfig
from models.recurrent_layers import BidirectionalGRU
from models.states import SOURCE, StateRule

START, END = 1, 2
BOTH_CELLS = pytest.mark.parametrize("decoder", ["bahdanau", "luong"])
EVERY_SCORE = pytest.mark.parametrize("attention", SCORES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def config_of(**changes):
    fields = {
        "source_vocab_size": 20, "vocab_size": 12, "max_source_len": 12, "max_model_len": 16, "d_embedding": 5,
        "d_encoder": 4, "d_decoder": 8, "d_key": 6, "decoder": "bahdanau", "attention": "additive",
    }  # fmt: skip
    return RecurrentConfig(**fields | changes)


def model_of(**changes):
    return Recurrent(config_of(**changes)).double().eval()


def batch(rows=4, source_len=9, target_len=7):
    source_ids = torch.randint(3, 20, (rows, source_len))
    return source_ids, torch.randint(3, 12, (rows, target_len)), torch.tensor([9, 3, 0, 5])[:rows]


class TestEncoder:
    def test_it_equals_a_packed_bidirectional_gru(self):
        encoder, reference = (
            BidirectionalGRU(5, 4).double(),
            nn.GRU(5, 4, bidirectional=True, batch_first=True).double(),
        )
        for ours, suffix in ((encoder.onward, ""), (encoder.returning, "_reverse")):
            ours.load_state_dict({name: reference.state_dict()[name + suffix] for name, _ in ours.named_parameters()})
        x, lengths = torch.randn(4, 9, 5, dtype=torch.float64), torch.tensor([9, 1, 4, 6])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        expected, _ = nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
        torch.testing.assert_close(encoder(x, lengths), expected, rtol=0, atol=1e-10)

    def test_padding_of_any_content_and_length_changes_nothing(self):
        encoder, x = BidirectionalGRU(5, 4).double(), torch.randn(3, 9, 5, dtype=torch.float64)
        lengths = torch.tensor([9, 0, 5])
        expected = encoder(x, lengths)
        assert (expected[1] == 0).all()
        assert (expected[2, 5:] == 0).all()
        longer = torch.cat((x, torch.full((3, 4, 5), math.nan, dtype=torch.float64)), 1)
        longer[2, 5:] = math.inf
        memory = encoder(longer, lengths)
        torch.testing.assert_close(memory[:, :9], expected, rtol=0, atol=1e-12)
        assert (memory[:, 9:] == 0).all()

    def test_empty_sources_and_batches_keep_their_shapes(self):
        encoder = BidirectionalGRU(5, 4)
        assert encoder(torch.zeros(2, 0, 5), torch.tensor([0, 0])).shape == (2, 0, 8)
        assert encoder(torch.zeros(0, 3, 5), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8)


def gru(cell, x, hidden):
    """Apply the equations of Cho et al. in the order of torch's gates: reset, update, new."""
    from_x, from_hidden = cell.weight_ih @ x + cell.bias_ih, cell.weight_hh @ hidden + cell.bias_hh
    (rx, zx, nx), (rh, zh, nh) = from_x.chunk(3), from_hidden.chunk(3)
    reset, update = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
    return (1 - update) * torch.tanh(nx + reset * nh) + update * hidden


@BOTH_CELLS
@EVERY_SCORE
def test_it_equals_its_equations_written_out_for_one_row_and_token_at_a_time(decoder, attention):
    model = model_of(decoder=decoder, attention=attention)
    source_ids, token_ids, lengths = batch()
    logits, weights = model(source_ids, token_ids, lengths), model.attention_weights(source_ids, token_ids, lengths)
    score, cell, read = model.decoder.attention.score, model.decoder.cell, model.decoder.output
    formulas = {
        "dot": lambda s, h: s @ h,
        "scaled": lambda s, h: s @ h / math.sqrt(8),
        "general": lambda s, h: s @ score.query.weight.T @ h,
        "mean": lambda s, h: torch.zeros((), dtype=torch.float64),
    }
    fit = formulas.get(attention, lambda s, h: score.weight @ torch.tanh(score.query.weight @ s + score.key.weight @ h))
    memory = model.encode(source_ids, lengths)
    for row in (0, 1, 3):
        places = memory[row, : lengths[row]]
        hidden = torch.tanh(model.initial(places[0, 4:]))
        attentional = torch.zeros(8, dtype=torch.float64)
        for step, token in enumerate(token_ids[row]):
            embedded = model.token_embedding.weight[token]
            if decoder == "luong":  # the state moves first, fed with what was said before
                hidden = gru(cell, torch.cat((embedded, attentional)), hidden)
            alpha = torch.stack([fit(hidden, place) for place in places]).softmax(0)
            context = alpha @ places
            if decoder == "luong":
                attentional = said = torch.tanh(read(torch.cat((context, hidden))))
            else:
                hidden = gru(cell, torch.cat((embedded, context)), hidden)
                said = torch.tanh(read(torch.cat((hidden, context, embedded))))
            torch.testing.assert_close(logits[row, step], model.lm_head(said), rtol=0, atol=1e-10)
            found = weights.cross[0][row, 0, step]
            torch.testing.assert_close(found[: len(places)], alpha, rtol=0, atol=1e-10)
            assert (found[len(places) :] == 0).all()


def test_bahdanau_looks_before_the_token_is_read_and_luong_after():
    source_ids, token_ids, lengths = batch()
    others = (token_ids - 3 + 1) % 9 + 3
    for decoder, looks_before in (("bahdanau", True), ("luong", False)):
        model = model_of(decoder=decoder)
        first, second = (
            model.attention_weights(source_ids, ids, lengths).cross[0][:, 0] for ids in (token_ids, others)
        )
        assert torch.equal(first[:, 0], second[:, 0]) is looks_before
        assert not torch.allclose(first[:, 1], second[:, 1])


@BOTH_CELLS
@EVERY_SCORE
@pytest.mark.parametrize("chunks", [[1] * 7, [7], [3, 0, 4], [2, 5]], ids=str)
def test_any_chunking_equals_one_pass(decoder, attention, chunks):
    model = model_of(decoder=decoder, attention=attention)
    source_ids, token_ids, lengths = batch()
    full = model(source_ids, token_ids, lengths)
    state, logits = model.begin(model.encode(source_ids, lengths), lengths), []
    for ids in token_ids.split(chunks, 1):
        part, state = model.decode(ids, state)
        logits.append(part)
    torch.testing.assert_close(torch.cat(logits, 1), full, rtol=0, atol=1e-12)
    assert state.lengths.tolist() == [7] * 4


@BOTH_CELLS
def test_rows_that_bring_fewer_tokens_keep_their_state(decoder):
    model = model_of(decoder=decoder)
    source_ids, token_ids, lengths = batch()
    full = model(source_ids, token_ids, lengths)
    consumed = torch.zeros(4, dtype=torch.int64)
    state = model.begin(model.encode(source_ids, lengths), lengths)
    for new in torch.tensor([[2, 0, 1, 3], [0, 4, 3, 1], [5, 3, 3, 3]]):
        ids = torch.full((4, int(new.max())), 11)  # padding is a token like any other
        for row in range(4):
            ids[row, : new[row]] = token_ids[row, consumed[row] : consumed[row] + new[row]]
        logits, state = model.decode(ids, state, new)
        for row in range(4):
            expected = full[row, consumed[row] : consumed[row] + new[row]]
            torch.testing.assert_close(logits[row, : new[row]], expected, rtol=0, atol=1e-12)
        consumed += new
    assert torch.equal(state.lengths, consumed)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    _, after = model.decode(torch.full((4, 3), 5), state, torch.zeros(4, dtype=torch.int64))
    assert all(torch.equal(before[name], after.tensors[name]) for name in before)


@BOTH_CELLS
@EVERY_SCORE
def test_padding_and_neighbours_change_nothing(decoder, attention):
    model = model_of(decoder=decoder, attention=attention)
    source_ids, token_ids, lengths = batch()
    together = model(source_ids, token_ids, lengths)
    assert together.isfinite().all()
    for row, length in enumerate(lengths.tolist()):
        alone = model(source_ids[row : row + 1, :length], token_ids[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-12)
    padded = torch.cat((source_ids, torch.randint(0, 20, (4, 3))), 1)
    torch.testing.assert_close(model(padded, token_ids, lengths), together, rtol=0, atol=1e-12)


@BOTH_CELLS
def test_no_logit_depends_on_a_later_token(decoder):
    model = model_of(decoder=decoder)
    source_ids, token_ids, lengths = batch()
    embedded = []
    model.token_embedding.register_forward_hook(lambda _, __, output: embedded.append(output.retain_grad() or output))
    logits = model(source_ids, token_ids, lengths)
    logits[:, 3].sum().backward()
    assert (embedded[0].grad[:, 4:] == 0).all()
    assert (embedded[0].grad[:, :4] != 0).any(-1).all()


@BOTH_CELLS
@EVERY_SCORE
def test_states_are_declared_as_they_are(decoder, attention):
    model = model_of(decoder=decoder, attention=attention)
    source_ids, token_ids, lengths = batch()
    state = model.begin(model.encode(source_ids, lengths), lengths)
    _, after = model.decode(token_ids, state)
    rules = {spec.name: spec.rule for spec in model.state_specs()}
    fixed = ["memory", "keys"] if attention in ("additive", "concat") else ["memory"]
    replaced = ["hidden"] if decoder == "bahdanau" else ["hidden", "attentional"]
    assert rules == dict.fromkeys(fixed, StateRule.FIXED) | dict.fromkeys(replaced, StateRule.REPLACE)
    for spec in model.state_specs():
        before, now = state.tensors[spec.name], after.tensors[spec.name]
        assert before.shape == now.shape == (4, *spec.row_shape(state.capacity, 9))
        assert before.dtype == now.dtype == spec.dtype
        assert (spec.shape[0] == SOURCE) is (spec.rule is StateRule.FIXED)
        assert (before is now) is (spec.rule is StateRule.FIXED)
    assert {spec.dtype for spec in Recurrent(config_of()).state_specs()} == {torch.float32}


def test_what_was_said_is_part_of_the_state_and_survives_being_saved(tmp_path):
    model = model_of(decoder="luong")
    source_ids, token_ids, lengths = batch()
    _, state = model.decode(token_ids[:, :3], model.begin(model.encode(source_ids, lengths), lengths))
    expected, _ = model.decode(token_ids[:, 3:], state)
    torch.save(state.tensors, tmp_path / "state.pt")
    state.tensors.update(torch.load(tmp_path / "state.pt"))
    assert torch.equal(model.decode(token_ids[:, 3:], state)[0], expected)
    state.tensors["attentional"] = torch.zeros_like(state.tensors["attentional"])
    assert not torch.allclose(model.decode(token_ids[:, 3:], state)[0], expected)


@BOTH_CELLS
def test_rows_can_be_reordered_and_repeated_between_steps(decoder):
    model = model_of(decoder=decoder)
    source_ids, token_ids, lengths = batch()
    full = model(source_ids, token_ids, lengths)
    _, state = model.decode(token_ids[:, :3], model.begin(model.encode(source_ids, lengths), lengths))
    rows = torch.tensor([3, 0, 0, 2, 1])
    logits, _ = model.decode(token_ids[rows, 3:], state.select(rows))
    torch.testing.assert_close(logits, full[rows, 3:], rtol=0, atol=1e-12)


def test_source_and_keys_are_read_once_for_all_steps():
    model = model_of()
    source_ids, _, lengths = batch()
    calls = {"encoder": 0, "keys": 0}
    for name, module in (("encoder", model.encoder), ("keys", model.decoder.attention.score.key)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    search(model, source_ids, lengths, BeamSearch(width=3, max_tokens=8, start_token_id=START, end_token_id=END))
    assert calls == {"encoder": 1, "keys": 1}


@BOTH_CELLS
@torch.inference_mode()
def test_a_beam_of_one_is_greedy_and_a_wide_one_finds_the_best(decoder):
    model = model_of(decoder=decoder, vocab_size=4, d_embedding=6)
    source_ids, _, lengths = batch()
    memory = model.encode(source_ids, lengths)
    options = {"max_tokens": 4, "start_token_id": START, "end_token_id": END, "length_penalty": 0.0}
    for row, (best,) in enumerate(search(model, source_ids, lengths, BeamSearch(width=1, **options))):
        state, token, told = model.begin(memory, lengths).select(torch.tensor([row])), START, []
        while len(told) < 4:
            logits, state = model.decode(torch.tensor([[token]]), state)
            if (token := int(logits[0, -1].argmax())) == END:
                break
            told.append(token)
        assert list(best.token_ids) == told
    targets = [[]]
    finished = []
    while targets:
        told = targets.pop()
        if len(told) == 4:
            finished.append((tuple(told), 4))
            continue
        finished.append((tuple(told), len(told) + 1))
        targets += [[*told, token] for token in (0, 1, 3)]
    wide = search(model, source_ids[:2], lengths[:2], BeamSearch(width=4**3, **options))
    for row in range(2):
        likelihoods = {}
        for told, count in finished:
            labels = torch.tensor([*told, END][:count])
            inputs = torch.tensor([[START, *told][:count]])
            logits = model(source_ids[row : row + 1], inputs, lengths[row : row + 1])
            likelihoods[told] = float(logits[0].log_softmax(-1)[torch.arange(count), labels].sum())
        best = max(likelihoods, key=likelihoods.get)
        assert wide[row][0].token_ids == best
        assert wide[row][0].log_likelihood == pytest.approx(likelihoods[best], abs=1e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_any_normaliser_can_be_named(normalizer):
    model = model_of(normalizer=normalizer, temperature=0.2)
    weights = model.attention_weights(*batch()).cross[0][:, 0]
    torch.testing.assert_close(weights[[0, 1, 3]].sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert (weights[2] == 0).all()
    assert (normalizer == "hardmax") is bool((weights[[0, 1, 3]].amax(-1) == 1).all())


@BOTH_CELLS
@pytest.mark.parametrize("attention", ["additive", "general"])
def test_gradients_pass_gradcheck_with_a_row_of_no_source(decoder, attention):
    sizes = {"source_vocab_size": 4, "vocab_size": 3, "d_embedding": 2, "d_encoder": 2, "d_decoder": 3, "d_key": 2}
    model = model_of(decoder=decoder, attention=attention, **sizes)
    source_ids, token_ids = torch.tensor([[3, 1, 2], [1, 1, 1]]), torch.tensor([[1, 2], [1, 0]])
    names, parameters = zip(*model.named_parameters(), strict=True)

    def logits(*parameters):
        arguments = (source_ids, token_ids, torch.tensor([2, 0]))
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), arguments)

    assert torch.autograd.gradcheck(logits, parameters, fast_mode=True)


@BOTH_CELLS
def test_a_checkpoint_holds_it_whole(decoder, tmp_path):
    model = Recurrent(config_of(decoder=decoder, normalizer="entmax15")).eval()
    source_ids, token_ids, lengths = batch()
    trained = TrainedModel(module=model, tokenizer=None, source="here", licence="Apache-2.0")
    checkpoint.save(trained, tmp_path / "model")
    restored = checkpoint.load(tmp_path / "model").module
    assert (family_of(restored), restored.config) == ("recurrent", model.config)
    assert torch.equal(restored(source_ids, token_ids, lengths), model(source_ids, token_ids, lengths))


@BOTH_CELLS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_near_float32(decoder, dtype):
    model, arguments = Recurrent(config_of(decoder=decoder)).eval(), batch()
    expected = model(*arguments)
    logits = model.to(dtype)(*arguments)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=2e-2)
    assert {spec.dtype for spec in model.state_specs()} == {dtype}


def test_dropout_acts_in_training_only():
    model = Recurrent(config_of(), dropout=0.5)
    arguments = batch()
    assert not torch.equal(model(*arguments), model(*arguments))
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))


def test_empty_sources_and_empty_targets_keep_their_shapes():
    model = model_of()
    assert model(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([[1, 4], [1, 5]])).shape == (2, 2, 12)
    weights = model.attention_weights(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64))
    assert (weights.encoder, weights.decoder) == ([], [])
    assert weights.cross[0].shape == (2, 1, 0, 4)


class TestMisuse:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"d_decoder": 0}, "d_decoder is 0; it must be an integer of at least 1"),
            ({"decoder": "gru"}, "decoder is 'gru'; it must be one of bahdanau, luong"),
            ({"attention": "softmax"}, "attention is 'softmax'; it must be one of additive, concat, dot"),
            ({"normalizer": "relu"}, "normalizer is 'relu'; it must be one of softmax, sparsemax"),
            ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
            ({"attention": "dot", "d_decoder": 7}, "d_decoder 7 to be twice d_encoder 4; 'general' takes any"),
        ],
    )
    def test_a_wrong_configuration_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            config_of(**changes)

    def test_limits_are_kept(self):
        model = model_of()
        source_ids, token_ids, lengths = batch()
        with pytest.raises(ValueError, match="source_ids has 13 tokens; max_source_len is 12"):
            model.encode(torch.zeros(1, 13, dtype=torch.int64))
        memory = model.encode(source_ids, lengths)
        with pytest.raises(ValueError, match=r"capacity is 17; it must lie in 1\.\.16"):
            model.begin(memory, lengths, 17)
        with pytest.raises(ValueError, match="a row would hold 7 tokens; the state's capacity is 6"):
            model.decode(token_ids, model.begin(memory, lengths, 6))
        with pytest.raises(ValueError, match=r"lengths \[9, 3, 0, 10\] must lie in 0\.\.9"):
            model.encode(source_ids, torch.tensor([9, 3, 0, 10]))
