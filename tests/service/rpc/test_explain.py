"""What an explanation says and how large it may be, without a server: the rest is in end_to_end."""

import numpy as np
import pytest
import torch

from attendant._explaining import ExplanationParts, explain_request
from attendant.bundle import Explain, Places, WeightsSpec
from attendant.v1 import explain_pb2 as pb
from models.attention.functional import entropy as reference
from service.errors import InvalidField
from service.rpc import explain

HEADS = 3


def spec(kind: str, layer: int, rows: Places = Places.TOKENS, columns: Places = Places.TOKENS) -> WeightsSpec:
    return WeightsSpec(
        output=f"{kind}.{layer}", kind=kind, layer=layer, title=f"{kind}, layer {layer}", rows=rows, columns=columns
    )


TOLD = Explain(weights=(spec("decoder", 0), spec("decoder", 1), spec("cross", 0, Places.WRITTEN, Places.SOURCE)))
NUM_HEADS = {each.output: HEADS for each in TOLD.weights}


def chosen_of(**fields) -> list[tuple[str, list[int]]]:
    return [
        (each.spec.output, list(each.heads)) for each in explain.choose(pb.ExplainRequest(**fields), TOLD, NUM_HEADS)
    ]


def test_what_is_not_named_is_shown_whole():
    everything = [("decoder.0", [0, 1, 2]), ("decoder.1", [0, 1, 2]), ("cross.0", [0, 1, 2])]
    assert chosen_of() == everything
    assert chosen_of(kinds=["decoder"], layers=[1]) == everything[1:2]
    assert chosen_of(heads=[2, 0]) == [(output, [0, 2]) for output, _ in everything]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kinds": ["self"]}, "decoder, cross"),
        ({"layers": [0, 2]}, "layers 0 to 1"),
        ({"kinds": ["cross"], "layers": [1]}, "layers 0 to 0"),
        ({"heads": [HEADS]}, "heads 0 to 2"),
        ({"heads": [-1]}, "heads 0 to 2"),
    ],
)
def test_what_a_model_does_not_have_is_refused_with_what_it_has(fields, says):
    with pytest.raises(InvalidField, match=says):
        explain.choose(pb.ExplainRequest(**fields), TOLD, NUM_HEADS)


def test_too_large_an_answer_is_refused_with_what_to_ask_for_instead():
    def check(tokens: int, entropy_only: bool = False, **fields) -> None:
        sizes = dict.fromkeys(Places, tokens)
        chosen = explain.choose(pb.ExplainRequest(**fields), TOLD, NUM_HEADS)
        explain.check_cells(chosen, TOLD, NUM_HEADS, sizes, entropy_only=entropy_only)

    largest = int((explain.MAX_SENT / 9) ** 0.5)  # of three layers with three heads
    check(largest)
    with pytest.raises(InvalidField, match="name layers or heads, set entropy_only"):
        check(largest + 1)
    check(largest + 1, entropy_only=True)
    check(largest + 1, heads=[1])
    with pytest.raises(InvalidField, match="give a shorter one"):
        check(int((explain.MAX_COMPUTED / 9) ** 0.5) + 1, entropy_only=True)


def test_entropies_are_those_of_the_models():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 70, generator=generator).log().mul(4).softmax(-1)
    weights[3] = 0
    weights[4] = torch.eye(70)[9]
    ours = explain.entropy(weights.numpy())
    assert np.abs(ours - reference(weights).numpy()).max() < 1e-5
    assert ours[3] == ours[4] == 0 and not np.signbit(ours).any()


@pytest.mark.parametrize("columns", [1, 700, 70_000])
def test_long_heads_come_in_several_messages_and_are_whole_again(columns):
    rows = 211
    weights = np.random.default_rng(0).random((HEADS, rows, columns), np.float32)
    one = explain.Chosen(spec("self", 0, Places.TOKENS, Places.SOURCE), (0, 2))
    labels = {Places.TOKENS: [str(row) for row in range(rows)], Places.SOURCE: ["s"] * columns}
    if columns == 70_000:
        weights, labels[Places.TOKENS] = weights[:, :3], ["a", "b", "c"]
    parts = ExplanationParts()
    messages = list(explain.messages("m/1", [one], labels, (), {"self.0": weights}, sends_all=True))
    for message in messages:
        assert message.ByteSize() < 1 << 19
        parts.add(message)
    (layer,) = parts.whole().layers
    assert [head.head for head in layer.heads] == [0, 2]
    for head in layer.heads:
        assert np.array_equal(np.array(head.weights, np.float32), weights[head.head])


def test_patches_are_named_as_cells_of_a_spreadsheet():
    told = Explain(weights=(spec("self", 0),), grid=(2, 3), class_token=True)
    assert explain.patch_labels(told) == ["class", "A1", "B1", "C1", "A2", "B2", "C2"]
    wide = Explain(weights=(spec("self", 0),), grid=(2, 27))
    assert explain.patch_labels(wide)[-1] == "2,27"


def test_requests_of_the_client_say_exactly_what_was_given():
    assert explain_request("m", "hi", {}) == pb.ExplainRequest(model="m", text="hi")
    full = explain_request("m", None, {"token_ids": [], "target": "", "kinds": ["self"], "layers": [0], "heads": [1]})
    assert full.WhichOneof("input") == "token_ids" and full.WhichOneof("target") == "target_text"
    assert (list(full.kinds), list(full.layers), list(full.heads)) == (["self"], [0], [1])
    assert explain_request("m", None, {"image": b"x"}).image.encoded == b"x"
    for options in ({"image": b"x"}, {"target": "a", "target_ids": [1]}):
        with pytest.raises(ValueError, match="give"):
            explain_request("m", "hi", options)
    with pytest.raises(ValueError, match="exactly one"):
        explain_request("m", None, {})
    with pytest.raises(TypeError, match="unknown option 'layer'"):
        explain_request("m", "hi", {"layer": 1})
