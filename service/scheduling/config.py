"""The limits of one bundle's scheduler."""

from dataclasses import dataclass

from service.scheduling.slots import rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one bundle's scheduler, in tokens unless said otherwise.

    Args:
        num_slots: sequences that can run at once.
        capacity: positions one slot can hold.
        kv_budget: positions that all slots together may commit.
        chunk_tokens: prompt and source tokens of a step while other sequences decode.
        idle_chunk_tokens: prompt and source tokens of a step while nothing decodes.
        prefill_chunk: where every prompt is cut, or None where cuts do not matter; at 1 there is no prefill, and
            prompts go among the decode rows.
        inter_token_target: seconds that a step may take beside running streams, which sizes the chunks of prompts;
            0 leaves them at `chunk_tokens`, as does a scheduler that cannot foresee.
        ageing: seconds in the queue after which a request counts as one priority more urgent.
        window: positions behind the last one that stay in memory, or None where all do.
        reuses_prefixes: whether a prompt may begin with what another left in a slot: where states are nothing but
            what lies at each position.
        joins_prompts: whether short prompts of neighbouring slots may be read in one run, padded to the longest, where
            that is foreseen to be faster.
        row_buckets: how many decode rows a step may have, rising up to `num_slots`: they begin at slot 0 and are filled
            up with parked ones. Without any, a step has as many as lie between the lowest and the highest.
    """

    num_slots: int
    capacity: int
    kv_budget: int
    chunk_tokens: int = 256
    idle_chunk_tokens: int = 512
    prefill_chunk: int | None = None
    inter_token_target: float = 0.0
    ageing: float = 10.0
    window: int | None = None
    reuses_prefixes: bool = False
    joins_prompts: bool = False
    row_buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("num_slots", 1), ("capacity", 2), ("chunk_tokens", 4), ("idle_chunk_tokens", 4)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}, must be at least {least}")
        if not self.inter_token_target >= 0:
            raise ValueError(f"inter_token_target is {self.inter_token_target}, must be at least 0")
        if not self.ageing > 0:
            raise ValueError(f"ageing is {self.ageing}, must be more than 0")
        for name in ("prefill_chunk", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        buckets = self.row_buckets
        if buckets and (list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != self.num_slots):
            raise ValueError(f"row_buckets is {buckets}, must rise from at least 1 to num_slots, {self.num_slots}")
        if self.kv_budget < rounded(self.held(self.capacity)):
            raise ValueError(
                f"kv_budget is {self.kv_budget}, must hold one sequence of {rounded(self.held(self.capacity))} tokens"
            )

    def held(self, positions: int) -> int:
        """Return how many of a sequence's positions are in memory at most: the window and a step's new ones."""
        if self.window is None:
            return positions
        return min(positions, self.window + max(self.idle_chunk_tokens, self.chunk_tokens, self.prefill_chunk or 0))
