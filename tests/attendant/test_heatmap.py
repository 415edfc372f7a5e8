"""`attendant.heatmap`: entropies, what is refused, the colour scale, labels, the terminal and the PNG."""

import io
import math
import re
import subprocess
import sys
import unicodedata

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attendant.heatmap import (
    AttentionMap,
    Layer,
    Sheet,
    entropy_nats,
    entropy_table,
    render_png,
    render_terminal,
    takes_colours,
)
from attendant.heatmap.colours import LEVELS, colour, ink, scale
from attendant.heatmap.glyphs import font
from attendant.heatmap.labels import clusters, label, shortened, width
from attendant.heatmap.words import short

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)
weight = st.floats(0.0, 1e300)
rows_of_weights = st.lists(weight, min_size=1, max_size=12)


@st.composite
def maps(draw):
    """A map of any tokens, with softmax weights under a random mask; rows that see nothing occur."""
    num_rows, num_columns = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    weights, mask = [], []
    for _ in range(num_rows):
        allowed = draw(st.lists(st.booleans(), min_size=num_columns, max_size=num_columns))
        scores = draw(st.lists(st.floats(-3, 3), min_size=num_columns, max_size=num_columns))
        exponentials = [math.exp(score) * allows for score, allows in zip(scores, allowed, strict=True)]
        weights.append([value / (sum(exponentials) or 1.0) for value in exponentials])
        mask.append(allowed)
    tokens = st.text(max_size=8)
    rows = draw(st.lists(tokens, min_size=num_rows, max_size=num_rows))
    columns = draw(st.lists(tokens, min_size=num_columns, max_size=num_columns))
    title = draw(st.text(max_size=8))
    return AttentionMap.of(weights, rows=rows, columns=columns, mask=mask, title=title)


def sheet_of(*heads, title="sheet"):
    return Sheet(title=title, layers=(Layer(title="layer 0", heads=heads),))


def two_by_two(weights=((1.0, 0.0), (0.25, 0.75)), mask=((True, False), (True, True)), tokens=("a", "b")):
    return AttentionMap.of(weights, rows=tokens, columns=tokens, mask=mask, title="head 0")


# Entropy.


def test_entropy_is_in_nats():
    assert entropy_nats([1 / 8] * 8) == pytest.approx(2.0794415416798357, abs=1e-12)
    assert entropy_nats([0.25, 0.75]) == pytest.approx(0.5623351446188083, abs=1e-12)


def test_a_single_choice_and_no_choice_have_no_entropy():
    for row in ([], [0.0], [1.0], [0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.3], [5e-324, 0.0]):
        assert entropy_nats(row) == 0.0
        assert math.copysign(1.0, entropy_nats(row)) == 1.0


@PROPERTY
@given(rows_of_weights)
def test_entropy_lies_between_zero_and_the_logarithm_of_the_weights_above_zero(row):
    most = math.log(max(1, sum(value > 0 for value in row)))
    assert 0.0 <= entropy_nats(row) <= most + 1e-12


@PROPERTY
@given(rows_of_weights, st.randoms(use_true_random=False), st.integers(-20, 20))
def test_entropy_is_that_of_shares_whatever_their_order_and_sum(row, random, exponent):
    scaled = [math.ldexp(value, exponent) for value in row if value == 0.0 or 1e-200 < value < 1e200]
    plain = [math.ldexp(value, -exponent) for value in scaled]
    random.shuffle(scaled)
    assert entropy_nats(scaled) == pytest.approx(entropy_nats(plain), abs=1e-12)


@PROPERTY
@given(st.integers(1, 40), st.floats(0, 8), st.integers(0, 2**32 - 1))
def test_a_causal_row_never_exceeds_the_logarithm_of_what_it_sees(num_tokens, sharpness, seed):
    scores = sharpness * numpy.random.default_rng(seed).normal(size=(num_tokens, num_tokens))
    mask = numpy.tril(numpy.ones((num_tokens, num_tokens), dtype=bool))
    exponentials = numpy.where(mask, numpy.exp(scores - scores.max(1, keepdims=True)), 0.0)
    tokens = [str(place) for place in range(num_tokens)]
    head = AttentionMap.of(exponentials / exponentials.sum(1, keepdims=True), rows=tokens, columns=tokens, mask=mask)
    for t, (entropy, maximum) in enumerate(zip(head.entropies, head.maxima, strict=True)):
        assert maximum == math.log(t + 1)
        assert entropy <= maximum + 1e-12


def test_the_mean_entropy_leaves_out_rows_that_may_attend_to_nothing():
    mask = ((False, False), (True, True))
    head = two_by_two(((0.0, 0.0), (0.5, 0.5)), mask)
    assert (head.entropies, head.maxima) == ((0.0, math.log(2)), (0.0, math.log(2)))
    assert head.mean_entropy == head.mean_maximum == math.log(2)
    blind = two_by_two(((0.0, 0.0),) * 2, ((False, False),) * 2)
    assert (blind.mean_entropy, blind.mean_maximum) == (0.0, 0.0)


# What is refused, and what is taken.


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf, -math.inf])
def test_what_is_no_weight_is_refused(bad):
    with pytest.raises(ValueError, match=re.escape(f"weight 1 is {bad}")):
        entropy_nats([0.5, bad])
    with pytest.raises(ValueError, match=re.escape(f"weights row 1, column 0 is {bad}")):
        two_by_two(((1.0, 0.0), (bad, 0.5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ((1.0, 0.0), (1.0,))}, "weights row 1 has 1 cells; there are 2 column labels"),
        ({"weights": ((1.0, 0.0),)}, "weights has 1 rows; there are 2 row labels"),
        ({"tokens": ("a",)}, "weights has 2 rows; there are 1 row labels"),
        ({"mask": ((True, False),)}, "mask has 1 rows; there are 2 row labels"),
        ({"mask": ((True, False), (True,))}, "mask row 1 has 1 cells; there are 2 column labels"),
        ({"mask": ((1, 0), (1, 1))}, "mask row 0, column 0 is 1; give booleans, True = attend"),
        ({"mask": ((False, True), (False, False))}, "weights row 0, column 0 is 1.0 where mask is False"),
        ({"weights": (1.0, 0.0)}, "weights must have two axes"),
        ({"weights": (((1.0, 0.0), (1.0, 0.0)),) * 2}, "weights must have two axes"),
        ({"weights": 1.0}, "weights must have two axes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        two_by_two(**change)


def test_a_layer_without_heads_is_refused():
    with pytest.raises(ValueError, match="'layer 3' has no heads"):
        Layer(title="layer 3", heads=())


def test_arrays_buffers_and_nested_sequences_make_the_same_map():
    values = numpy.array([[1.0, 0.0], [0.25, 0.75]])
    same = [values, values.astype(numpy.float32), memoryview(values), values.tolist(), list(values), values.T.T]
    made = {AttentionMap.of(one, rows="ab", columns="ab", mask=values > 0) for one in same}
    assert len(made) == 1


# The colour scale.


def luminance(rgb):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (part / 255 for part in rgb)]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_lightness_grows_evenly_with_the_weight():
    lightness = [116 * luminance(one) ** (1 / 3) - 16 for one in scale()]  # CIE L*
    steps = numpy.diff(lightness)
    assert len(set(scale())) == LEVELS
    assert steps.min() > 0
    ideal = numpy.linspace(lightness[0], lightness[-1], LEVELS)
    assert lightness[-1] - lightness[0] > 85
    assert numpy.abs(lightness - ideal).max() < 4


def test_the_scale_is_ordered_for_eyes_without_red_or_without_green():
    """Simulated as Machado, Oliveira and Fernandes (2009) do, at full severity, in linear light."""
    protanopia = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
    deuteranopia = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
    parts = numpy.array(scale()) / 255
    linear = numpy.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    for matrix in (protanopia, deuteranopia):
        seen = numpy.clip(linear @ numpy.array(matrix).T, 0, 1) @ [0.2126, 0.7152, 0.0722]
        assert numpy.diff(seen[:: LEVELS // 32]).min() > 0


def test_weights_outside_the_scale_have_the_colours_of_its_ends():
    assert (colour(-1.0), colour(2.0)) == (colour(0.0), colour(1.0)) == (scale()[0], scale()[-1])


def test_numbers_are_legible_on_every_colour():
    for step in range(LEVELS):
        light, dark = sorted((luminance(colour(step / 255)), luminance(ink(step / 255))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2 AA


def test_weights_are_written_in_few_characters():
    written = {0.0: "", 0.004: "", 0.005001: ".01", 0.5: ".50", 0.994: ".99", 0.996: "1", 1.0: "1", 1.5: "1.50"}
    assert {value: short(value) for value in written} == written


# Labels.


@PROPERTY
@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_no_label_holds_a_character_that_acts(token):
    text = label(token)
    hidden = [c for c in text if unicodedata.category(c)[0] in "CZ"]
    assert hidden == []
    text.encode("utf-8")
    assert all(width(cluster) in (1, 2) for cluster in clusters(text))


def test_labels_show_what_cannot_be_seen():
    shown = {
        " the": "␣the",
        "a\nb\t": "a\\nb\\t",
        "\x1b[31m": "\\x1b[31m",
        "\u202e": "\\u202e",
        "\ud800": "\\ud800",
        "\U000e0041": "\\U000e0041",
        "\u0301": "◌\u0301",
        "e\u0301": "e\u0301",
        "\xa0": "\\xa0",
    }
    assert {token: label(token) for token in shown} == shown


@PROPERTY
@given(st.text(), st.integers(3, 12))
def test_a_shortened_label_fits(token, limit):
    text = label(token)
    cut = shortened(text, limit)
    assert width(cut) <= limit
    assert cut == text or (cut.endswith("…") and text.startswith(cut[:-1]))


# The terminal.


@PROPERTY
@given(maps())
def test_terminal_lines_are_aligned_and_only_colour(head):
    text = render_terminal(sheet_of(head, title="any"), colours=True)
    bare = re.sub(r"\x1b\[(?:0|38;2;\d+;\d+;\d+)m", "", text)
    assert [c for c in bare if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs")] == []
    rows = bare.split("\n\n")[2].split("\n")[-len(head.rows) :] if head.rows else []
    notes = [re.search(r" \d+\.\d\d / \d+\.\d\d(  sum \S+)?$", row) for row in rows]
    assert len({width(row[: note.start()]) for row, note in zip(rows, notes, strict=True)}) <= 1


@PROPERTY
@given(maps())
def test_without_colours_the_terminal_gets_ascii_alone(head):
    text = render_terminal(sheet_of(head, title="é"), colours=False) + entropy_table(sheet_of(head))
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


def test_a_terminal_shows_weights_masks_and_entropies():
    coloured = render_terminal(sheet_of(two_by_two(tokens=("日", " b"))), colours=True)
    red, green, blue = colour(0.75)
    assert f"\x1b[38;2;{red};{green};{blue}m██\x1b[0m 0.56 / 0.69" in coloured
    plain = render_terminal(sheet_of(two_by_two()), colours=False)
    assert "\n  a b\na @@// 0.00 / 0.00\nb ::## 0.56 / 0.69\n" in plain


def test_sums_are_told_where_they_are_not_1():
    mask = ((True, False), (True, True))
    unusual = two_by_two(((1.0, 0.0), (0.3, 0.5)), mask)
    assert "/ 0.69  sum 0.8\n" in render_terminal(sheet_of(unusual), colours=False)
    rounded = two_by_two(((1.0, 0.0), (0.5, 0.498)), mask)
    assert "sum" not in render_terminal(sheet_of(rounded), colours=False)


def test_the_table_has_one_line_for_each_head():
    head = two_by_two()
    table = entropy_table(
        Sheet(title="", layers=(Layer(title="one", heads=(head,) * 2), Layer(title="two", heads=(head,))))
    )
    assert [line.split() for line in table.splitlines()][1:] == [
        ["one", "head", "0", "0.281", "0.347", "81%"],
        ["one", "head", "0", "0.281", "0.347", "81%"],
        ["two", "head", "0", "0.281", "0.347", "81%"],
    ]


class Stream(io.StringIO):
    def __init__(self, *, tty, encoding="utf-8"):
        super().__init__()
        self.tty, self.named = tty, encoding

    def isatty(self):
        return self.tty

    @property
    def encoding(self):
        return self.named


def test_colours_are_for_terminals_that_take_them_and_users_who_want_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert takes_colours(Stream(tty=True))
    assert not takes_colours(Stream(tty=False))
    assert not takes_colours(Stream(tty=True, encoding="ascii"))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colours(Stream(tty=True))
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not takes_colours(Stream(tty=True))


# The PNG.


def opened(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def areas(image):
    return {rgb: count for count, rgb in image.convert("RGB").getcolors(image.width * image.height)}


def test_a_png_shows_each_weight_in_its_colour():
    weights = ((0.0, 0.1, 0.9), (0.35, 0.65, 0.0), (0.0, 0.0, 1.0))
    mask = ((True, True, True), (True, True, False), (False, False, True))
    head = AttentionMap.of(weights, rows="abc", columns="def", mask=mask, title="head 0")
    found = areas(opened(render_png(Layer(title="layer", heads=(head,)))))
    cell = 43 * 43  # 44 pixels less the line between cells
    for value in (0.0, 0.1, 0.9, 0.35, 0.65, 1.0):
        assert 0.7 * cell < found[colour(value)] < 1.2 * cell, value  # numbers cover some, the scale shows it too
    assert found[(244, 244, 245)] > 3 * 44 * 44 / 2  # the hatching of three masked cells


def test_a_png_grows_with_its_tokens_and_heads_and_cells_shrink():
    sizes = {}
    for num_tokens in (2, 16, 64, 150):
        tokens = ["t"] * num_tokens
        head = AttentionMap.of(numpy.full((num_tokens,) * 2, 1 / num_tokens), rows=tokens, columns=tokens)
        sizes[num_tokens] = opened(render_png(Layer(title="", heads=(head,)))).size
    heights = [size[1] for size in sizes.values()]
    cells = {2: 44, 16: 44, 64: 18, 150: 8}
    rest = heights[0] - 2 * 44
    assert heights == [rest + n * cell for n, cell in cells.items()]
    four = opened(render_png(Layer(title="", heads=(two_by_two(),) * 4)))
    assert four.size[1] > heights[0]


def test_a_png_describes_itself_and_is_the_same_each_time():
    layer = Layer(title="layer é", heads=(two_by_two(),))
    image = opened(render_png(layer))
    assert image.text["Title"] == "layer \\xe9"
    assert image.text["Description"] == "head 0: mean entropy 0.28 of at most 0.35 nats"
    assert render_png(layer) == render_png(layer)


@settings(PROPERTY, max_examples=25)
@given(maps())
def test_any_map_becomes_a_png(head):
    assert opened(render_png(Layer(title="any", heads=(head,)))).format == "PNG"


def test_a_picture_too_large_is_refused():
    tokens = ["t"] * 60
    head = AttentionMap.of(numpy.zeros((60, 60)), rows=tokens, columns=tokens)
    with pytest.raises(ValueError, match="at most 64,000,000 are drawn: give fewer tokens or fewer heads"):
        render_png(Layer(title="large", heads=(head,) * 60))


def test_the_font_has_the_letters_that_labels_need():
    assert all(bytes(font(20).getmask(chr(code))) != bytes(font(20).getmask("\uffff")) for code in range(0x21, 0x7F))


def test_importing_heat_maps_loads_neither_numpy_nor_anything_heavier():
    program = "import sys, attendant.heatmap; print(sorted({'numpy', 'pydantic', 'torch', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
