"""What must hold of a scheduler between any two operations, as a function over a snapshot."""

from collections import Counter

from service.scheduling.config import SchedulerConfig
from service.scheduling.sequence import Phase, SequenceView, Snapshot


def violations(snapshot: Snapshot) -> list[str]:
    """Return every broken invariant, in words; an empty list means all is well."""
    config = snapshot.config
    held = [slot for view in snapshot.sequences for slot in view.slots]
    found = [f"slot {slot} is held {count} times" for slot, count in Counter(held).items() if count > 1]
    found += [f"slot {slot} is held and free" for slot in sorted(set(held) & snapshot.free_slots)]
    if set(held) | snapshot.free_slots != set(range(config.num_slots)):
        found.append(f"held {sorted(held)} and free {sorted(snapshot.free_slots)} are not all {config.num_slots} slots")
    if snapshot.committed > config.kv_budget:
        found.append(f"{snapshot.committed} positions committed of {config.kv_budget}")
    if snapshot.reserved > snapshot.committed:
        found.append(f"{snapshot.reserved} positions reserved but {snapshot.committed} committed")
    for view in snapshot.sequences:
        found += [f"{view.request_id}: {problem}" for problem in _problems(view, config)]
    return found


def _problems(view: SequenceView, config: SchedulerConfig) -> list[str]:
    found = []
    if view.max_total_tokens > config.capacity:
        found.append(f"may need {view.max_total_tokens} of {config.capacity} positions")
    if len(view.slots) != (0 if view.phase is Phase.WAITING else view.num_slots):
        found.append(f"{view.phase.value} with slots {view.slots}, needs {view.num_slots}")
    if view.num_prompt + view.num_output > view.max_total_tokens:
        found.append(f"has {view.num_prompt} + {view.num_output} tokens of {view.max_total_tokens}")
    reads_prompt = view.num_computed < view.num_prompt and view.num_output == 0
    expected = {
        Phase.WAITING: view.num_computed == 0 and view.num_output == 0,
        Phase.ENCODE: view.num_computed == 0 and view.num_output == 0,
        Phase.PREFILL: reads_prompt,
        # The newest token's own state is written by the step that feeds it.
        Phase.DECODE: view.num_computed == view.num_prompt + view.num_output - 1 or reads_prompt,
    }
    if not expected[view.phase]:
        found.append(f"{view.phase.value} with {view.num_computed} computed, {view.num_output} generated")
    if (
        config.prefill_chunk is None
        and view.phase is Phase.PREFILL
        and view.num_prompt - view.num_computed == 1
        and view.num_prompt > 1
    ):
        found.append("a single prompt token is left to prefill")
    return found
