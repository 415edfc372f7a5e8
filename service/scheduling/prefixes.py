"""What prompts have left behind in slots, and which of it a new prompt begins with.

Only positions that were computed in chunks of a prompt count: those bits are the same however the prompt was cut, and
so the same as if they were computed again. A generated token's position was computed alone, which rounds differently.
"""

from dataclasses import dataclass

MIN_PREFIX = 16
"""Shorter beginnings are computed again: copying them saves nothing."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A slot holds the states of the first `length` tokens of a prompt."""

    prompt: tuple[int, ...] = ()
    length: int = 0

    def shared(self, prompt: tuple[int, ...]) -> int:
        """Return how many leading tokens of another prompt these are, by bisection over comparisons of whole ranges."""
        most = min(self.length, len(prompt))
        if not most or self.prompt[0] != prompt[0]:
            return 0
        least = 1  # the first `least` tokens agree, the first `most` + 1 do not
        while least < most:
            middle = (least + most + 1) // 2
            if self.prompt[least:middle] == prompt[least:middle]:
                least = middle
            else:
                most = middle - 1
        return least


NOTHING = Prefix()


class Prefixes:
    """What each slot holds.

    Args:
        num_slots: slots there are.
    """

    def __init__(self, num_slots: int) -> None:
        self._held = [NOTHING] * num_slots

    def __getitem__(self, slot: int) -> Prefix:
        """Return what a slot holds."""
        return self._held[slot]

    def put(self, slot: int, prefix: Prefix) -> None:
        """Say what a slot holds from now on."""
        self._held[slot] = prefix

    def longest(self, prompt: tuple[int, ...]) -> tuple[int, int] | None:
        """Return the slot that holds most of a prompt's beginning, and how many tokens; None if it is not worth it.

        Two tokens are always left to compute: a chunk of one would round differently.
        """
        shared = [prefix.shared(prompt) if prefix.length else 0 for prefix in self._held]
        slot = max(range(len(shared)), key=shared.__getitem__)
        length = min(shared[slot], len(prompt) - 2)
        return (slot, length) if length >= MIN_PREFIX else None
