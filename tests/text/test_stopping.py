"""Stop strings are found wherever the text is cut, and nothing of them is ever delivered."""

from hypothesis import given, settings
from hypothesis import strategies as st

from service.text import StopStrings

PROPERTY = settings(deadline=None, derandomize=True, max_examples=500)
FEW = st.text(alphabet="abc", max_size=6)


def first_match(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Return the text before the string that is complete first (of several, the longest), and that string."""
    for end in range(1, len(text) + 1):
        complete = [string for string in strings if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@PROPERTY
@given(pieces=st.lists(FEW, max_size=12), strings=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1))
def test_any_cut_of_a_text_gives_what_a_search_of_the_whole_gives(pieces: list[str], strings: list[str]) -> None:
    stop = StopStrings(strings)
    delivered = ""
    for piece in pieces:
        delivered += stop.append(piece)
        if stop.matched is not None:
            break
    else:
        delivered += stop.flush()
    assert (delivered, stop.matched) == first_match("".join(pieces), strings)


@PROPERTY
@given(pieces=st.lists(FEW, max_size=12), string=st.text(alphabet="abc", min_size=1, max_size=5))
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], string: str) -> None:
    stop = StopStrings([string])
    seen = delivered = ""
    for piece in pieces:
        seen += piece
        delivered += stop.append(piece)
        if stop.matched is not None:
            return
        held = next(k for k in range(len(string) - 1, -1, -1) if seen.endswith(string[:k]))
        assert len(delivered) == len(seen) - held


def test_text_is_matched_as_it_stands_and_not_as_a_pattern() -> None:
    stop = StopStrings(["]", "^$", "\\d"])
    assert stop.append("a.^b\\") == "a.^b"
    assert stop.append("n ^") == "\\n "
    assert stop.append("$ tail") == ""
    assert stop.matched == "^$"


def test_of_strings_complete_at_once_the_longest_counts() -> None:
    stop = StopStrings(["c", "abc"])
    assert stop.append("x abc") == "x "
    assert stop.matched == "abc"
