"""The HTML page of heat maps: what it says, that nothing in a token acts, and how a real browser shows it."""

import io
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attendant.heatmap import AttentionMap, Layer, Sheet, render_html
from attendant.heatmap.colours import colour, level
from attendant.heatmap.labels import label

TOKENS = ("<s>", "The", " end", "<script>alert(1)</script>", "\x1b[31m", "\"'&")
LOADS = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "form", "base", "svg", "use"}
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """What a page holds: tags, attributes, and the text of each cell and header of its tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.cells, self.headers, self.captions = Counter(), [], [], [], []
        self.open, self._into = [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        into = {"td": self.cells, "th": self.headers, "caption": self.captions}.get(tag)
        if into is not None:
            self._into = into
            into.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th", "caption"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1][1] += data

    def of(self, name):
        return [value for _, found, value in self.attributes if found == name]


def example(num_layers=2, num_heads=3, tokens=TOKENS):
    """Causal maps of growing sharpness; in the last head one row may attend to nothing, and one does not sum to 1."""
    n = len(tokens)
    mask = numpy.tril(numpy.ones((n, n), dtype=bool))
    layers = []
    for index in range(num_layers):
        heads = []
        for place in range(num_heads):
            scores = place * numpy.random.default_rng(index).normal(size=(n, n))
            weights = numpy.where(mask, numpy.exp(scores), 0.0)
            weights /= weights.sum(1, keepdims=True)
            seen = mask.copy()
            if place == num_heads - 1:
                weights[2], seen[2] = 0.0, False
                weights[3] *= 0.8
            heads.append(AttentionMap.of(weights, rows=tokens, columns=tokens, mask=seen, title=f"head {place}"))
        layers.append(Layer(title=f"self-attention, layer {index}", heads=tuple(heads)))
    return Sheet(title="a model: <b>&", layers=tuple(layers))


def test_the_page_needs_nothing_but_itself_and_forbids_the_rest():
    text = render_html(example())
    page = Page(text)
    assert set(page.tags) & LOADS == set()
    assert [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "srcset", "style")] == []
    assert not re.search(r"url\(|@import|https?:|//", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.of("content")
    assert page.open == []


def test_every_map_can_be_reached_from_the_table_of_entropies():
    page = Page(render_html(example()))
    anchors = [value for value in page.of("href") if value.startswith("#")]
    assert page.of("href") == anchors
    ids = page.of("id")
    assert len(set(ids)) == len(ids)
    assert {f"#{one}" for one in ids} == set(anchors) == {f"#L{i}{h}" for i in (0, 1) for h in ("", "H0", "H1", "H2")}


def test_cells_tell_weights_masks_entropies_and_odd_sums():
    sheet = example(num_layers=1)
    page = Page(render_html(sheet))
    classes = Counter(cell["class"] for cell, _ in page.cells if "class" in cell)
    hidden = sum(not head.allows(t, s) for head in sheet.layers[0].heads for t in range(6) for s in range(6))
    assert classes["x"] == hidden == 3 * 15 + 3
    notes = [text for cell, text in page.cells if cell.get("class") == "n"]
    assert notes[:6] == [f"{math.log(t + 1):.2f} / {math.log(t + 1):.2f}" for t in range(6)]  # head 0 is uniform
    assert notes[-4:-2] == ["0.00 / 0.00  sum 0", notes[-3]]
    assert notes[-3].endswith("/ 1.39  sum 0.8")
    assert (f"c{level(1 / 6)}", "0.1667", ".17") in [
        (cell.get("class"), cell.get("title"), text) for cell, text in page.cells
    ]
    assert (
        page.captions[1][1] == f"head 0: mean entropy {math.log(720) / 6:.2f} of at most {math.log(720) / 6:.2f} nats"
    )


def test_tokens_are_headers_of_their_rows_and_columns():
    page = Page(render_html(example(num_layers=1, num_heads=2)))
    shown = [label(token) for token in TOKENS]
    for scope, extra in (("row", 1), ("col", 2 + 2)):  # the overview's own, and the column of entropies
        found = [text for header, text in page.headers if header["scope"] == scope]
        assert [text for text in found if text in shown] == shown * 2
        assert len(found) == 2 * len(shown) + extra


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=()), max_size=12), min_size=1, max_size=4), st.text())
def test_no_token_acts_whatever_it_holds(tokens, title):
    head = AttentionMap.of(numpy.eye(len(tokens)), rows=tokens, columns=tokens, title=title)
    text = render_html(Sheet(title=title, layers=(Layer(title=title, heads=(head,)),)))
    text.encode("utf-8")
    page = Page(text)
    plain = Page(render_html(Sheet(title="", layers=(Layer(title="", heads=(head.of(
        head.weights, rows=["a"] * len(tokens), columns=["a"] * len(tokens)),)),))))  # fmt: skip
    assert page.tags == plain.tags
    assert [(tag, name) for tag, name, _ in page.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert [text for header, text in page.headers if header["scope"] == "row"][1:] == [label(one) for one in tokens]


def test_long_texts_have_small_cells_without_numbers_and_too_long_ones_are_refused():
    for num_tokens, size, is_numbered in ((24, "map", True), (25, "map small", False), (65, "map dense", False)):
        tokens = ["t"] * num_tokens
        head = AttentionMap.of(numpy.eye(num_tokens), rows=tokens, columns=tokens)
        page = Page(render_html(Sheet(title="", layers=(Layer(title="", heads=(head,)),))))
        assert size in page.of("class")
        assert ("1" in [text for cell, text in page.cells if cell.get("title") == "1"]) == is_numbered
    heads = (AttentionMap.of(numpy.eye(200), rows=["t"] * 200, columns=["t"] * 200),) * 51
    with pytest.raises(ValueError, match="2,040,000 cells; at most 2,000,000 are drawn"):
        render_html(Sheet(title="", layers=(Layer(title="", heads=heads),)))


def test_a_sheet_without_layers_is_still_a_page():
    assert Page(render_html(Sheet(title="nothing", layers=()))).open == []


# In a browser.


@pytest.fixture
def browse(visit, tmp_path):
    """Load a page with the given arguments of the browser; return its standard output and what it asked for."""

    def browse(page, *arguments):
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        done = visit((tmp_path / "page.html").as_uri(), *arguments)
        return done.output, done.requests

    return browse


def screenshot(browse, page, path, *arguments):
    browse(page, f"--screenshot={path}", *arguments)
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def test_a_browser_finds_every_cell_and_asks_for_nothing(browse):
    text = render_html(example())
    dom, requests = browse(text, "--dump-dom")
    assert requests == []
    shown, sent = Page(dom.decode()), Page(text)
    assert shown.cells == sent.cells
    assert shown.headers == sent.headers
    assert set(shown.tags) & LOADS == set()


@pytest.mark.slow
def test_a_request_would_have_been_seen(browse):
    """The check above has teeth: the same page with a picture from elsewhere, and without its policy."""
    text = render_html(example(num_layers=1)).replace("<main>", '<main><img src="http://127.0.0.1:9/a.png" alt="">')
    assert browse(re.sub("<meta http-equiv[^>]*>", "", text), "--dump-dom")[1] == ["http://127.0.0.1:9/a.png"]
    assert browse(text, "--dump-dom")[1] == []  # the policy alone prevents it


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_a_browser_draws_cells_in_the_colours_of_their_weights(browse, tmp_path, scheme):
    """Three of nine cells each of two weights, and three that are masked: 28 pixels a side."""
    weights = ((0.3, 0.7, 0.0), (0.7, 0.3, 0.0), (0.3, 0.7, 0.0))
    mask = ((True, True, False),) * 3
    tokens = ("a", "b", "c")
    head = AttentionMap.of(weights, rows=tokens, columns=tokens, mask=mask, title="head 0")
    text = render_html(Sheet(title="colours", layers=(Layer(title="layer 0", heads=(head,)),)))
    preferred = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    image = screenshot(browse, text, tmp_path / "page.png", preferred)
    found = {rgb: count for count, rgb in image.getcolors(image.width * image.height)}
    for value in (0.3, 0.7):
        assert 3 * 28 * 28 * 0.75 < found[colour(value)] <= 3 * 28 * 28 * 1.1, value  # numbers cover some
    paper = (0xFF,) * 3 if scheme == "light" else (0x23, 0x23, 0x29)
    blank = (0xF4, 0xF4, 0xF5) if scheme == "light" else (0x30, 0x30, 0x38)
    assert found[paper] == max(found.values())
    assert found[blank] > 3 * 28 * 28 * 0.4
