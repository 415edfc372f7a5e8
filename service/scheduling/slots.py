"""Arithmetic of slots and KV memory, over counters alone.

Memory is counted in positions. A held slot has reserved its whole sequence, so nothing admitted can stall. A free slot
may still have the pages an earlier sequence committed ("resident"): another may begin with what they hold, or on them,
and they are given back, the least recently used first, when somebody needs the memory, or when the server has been idle
for a while.
"""

PAGE_POSITIONS = 16
"""Positions are counted in groups of this many: 16 float32 vectors of width 64 fill one page."""


def rounded(positions: int) -> int:
    """Round positions up to whole groups."""
    return -(-positions // PAGE_POSITIONS) * PAGE_POSITIONS


class SlotLedger:
    """Who holds which slot, what it reserved, and how much memory is committed in all.

    Invariant: `committed` never exceeds `budget`.

    Args:
        num_slots: rows of the state pools.
        budget: positions that may be committed over all slots together.
        reuses_pages: whether a sequence writes where the one before it in its slot left pages; not so where those lie
            anywhere in the slot, because the ones behind a window were given back.
    """

    def __init__(self, num_slots: int, budget: int, *, reuses_pages: bool = True) -> None:
        self.budget = budget
        self._reuses_pages = reuses_pages
        self._reserved = [0] * num_slots
        self._resident = [0] * num_slots
        self._last_used = [0] * num_slots
        self._uses = 0
        self._free = set(range(num_slots))

    @property
    def num_slots(self) -> int:
        """Rows of the state pools."""
        return len(self._reserved)

    @property
    def free(self) -> frozenset[int]:
        """Slots nobody holds."""
        return frozenset(self._free)

    @property
    def reserved(self) -> int:
        """Positions reserved by all holders together."""
        return sum(self._reserved)

    @property
    def committed(self) -> int:
        """Positions whose memory is, or may come to be, committed."""
        return sum(max(pair) for pair in zip(self._reserved, self._resident, strict=True))

    @property
    def _held(self) -> int:
        """Positions that nothing can be taken from: those of all holders, and what their slots still have of others."""
        return self.committed - sum(self._resident[slot] for slot in self._free)

    def by_use(self) -> list[int]:
        """Return the free slots, those without pages first, then those whose pages were of use longest ago."""
        return sorted(self._free, key=lambda slot: (self._resident[slot] > 0, self._last_used[slot], slot))

    def touch(self, slot: int) -> None:
        """Say that what a slot holds is of use."""
        self._uses += 1
        self._last_used[slot] = self._uses

    def acquire(
        self, positions: int, count: int = 1, prefer: int | None = None, *, begun: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Take the `count` lowest free slots, if memory allows; the lowest keep the decode rows together.

        Args:
            positions: that each of them may come to hold.
            count: slots needed at once.
            prefer: a free slot to take first, whatever its number.
            begun: whether the sequence goes on with what `prefer` holds, so that its pages stay, however many.

        Returns:
            The slots, and the slots whose pages must be given back before they are written; None if they do not fit
            now.
        """
        need = rounded(positions)
        if len(self._free) < count or self._held + count * need > self.budget:
            return None
        slots = tuple(sorted(self._free, key=lambda slot: (slot != prefer, slot))[:count])
        kept = prefer if begun else None
        return slots, tuple(released for slot in slots for released in self._hold(slot, need, keep=slot == kept))

    def move(self, source: int, destination: int) -> tuple[int, ...] | None:
        """Hand a reservation on to a free slot; the pages of `source` stay resident.

        Returns:
            The slots whose pages must be given back before the copy; None if both copies do not fit at once.
        """
        need = self._reserved[source]
        if self._held + need > self.budget:
            return None
        released = self._hold(destination, need)
        self.give_back(source, need)
        return released

    def give_back(self, slot: int, written: int) -> None:
        """Free a slot in which `written` positions were committed."""
        self._resident[slot] = max(self._resident[slot], rounded(written))
        self._reserved[slot] = 0
        self._free.add(slot)
        self.touch(slot)

    def release_idle(self) -> tuple[int, ...]:
        """Give back the pages of every free slot and return those slots."""
        idle = tuple(slot for slot in sorted(self._free) if self._resident[slot])
        for slot in idle:
            self._resident[slot] = 0
        return idle

    def _hold(self, slot: int, need: int, *, keep: bool = False) -> tuple[int, ...]:
        self._free.remove(slot)
        self._reserved[slot] = need
        released = []
        if self._resident[slot] > (need if self._reuses_pages else 0) and not keep:
            self._resident[slot] = 0
            released.append(slot)
        resident = [victim for victim in self._free if self._resident[victim]]
        for victim in (*sorted(resident, key=lambda free: self._last_used[free]), slot):
            if self.committed <= self.budget:
                break
            self._resident[victim] = 0
            released.append(victim)
        return tuple(released)
