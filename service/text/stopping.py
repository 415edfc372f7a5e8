"""Stop strings, found in text that arrives in pieces.

What the caller sees never contains a stop string, nor the beginning of one that is completed later: text that
could still become one is held back.
"""

import re
from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be complete in a growing text (of several at once, the longest).

    How the text is cut into pieces changes neither the match nor the text before it. Each character costs one
    comparison per string, amortised (Knuth, Morris and Pratt, 1977); text without any stop string's first
    character costs one search.

    Args:
        strings: not empty, each at least one character.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._patterns = [(string, _failures(string)) for string in strings]
        self._states = [0] * len(strings)  # characters of each string that the text ends with
        self._starts = re.compile("[" + "".join(re.escape(string[0]) for string in strings) + "]")
        self._held = ""
        self.matched: str | None = None

    def append(self, text: str) -> str:
        """Return the text that is certain to come before any match; once `matched` is set, the last of it.

        Must not be called after a match.
        """
        assert self.matched is None, self.matched
        begin = 0
        if not self._held:
            start = self._starts.search(text)
            if start is None:
                return text
            begin = start.start()
        for end, character in enumerate(text[begin:], begin + 1):
            if self._advance(character):
                assert self.matched is not None
                seen = self._held + text[:end]
                self._held = ""
                return seen[: len(seen) - len(self.matched)]
        seen = self._held + text
        certain = len(seen) - max(self._states)
        self._held = seen[certain:]
        return seen[:certain]

    def flush(self) -> str:
        """Return the text held back, at the end of a text without a match."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> bool:
        """Take one character; return whether it completes a string."""
        for i, (string, failures) in enumerate(self._patterns):
            state = self._states[i]
            while state and string[state] != character:
                state = failures[state - 1]
            if string[state] == character:
                state += 1
            self._states[i] = state
            if state == len(string) and (self.matched is None or len(string) > len(self.matched)):
                self.matched = string
        return self.matched is not None


def _failures(string: str) -> list[int]:
    """Return for each prefix the length of its longest proper suffix that is also a prefix of the string."""
    failures = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = failures[length - 1]
        if string[i] == string[length]:
            length += 1
        failures[i] = length
    return failures
