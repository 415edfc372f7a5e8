"""The arithmetic of slots and KV memory."""

import random

import pytest

from service.scheduling.slots import SlotLedger, rounded


@pytest.mark.parametrize(("positions", "expected"), [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_positions_are_rounded_up_to_whole_groups(positions: int, expected: int) -> None:
    assert rounded(positions) == expected


def test_the_lowest_free_slot_is_taken() -> None:
    ledger = SlotLedger(4, 1000)
    assert [ledger.acquire(10)[0] for _ in range(4)] == [(0,), (1,), (2,), (3,)]
    ledger.give_back(2, 10)
    ledger.give_back(1, 10)
    assert ledger.acquire(10)[0] == (1,)


def test_a_sequence_that_does_not_fit_the_budget_waits() -> None:
    ledger = SlotLedger(4, 64)
    assert ledger.acquire(48) is not None
    assert ledger.acquire(32) is None
    assert ledger.acquire(16) is not None


def test_resident_pages_are_given_back_only_under_pressure() -> None:
    ledger = SlotLedger(3, 64)
    (first,), _ = ledger.acquire(48)
    ledger.give_back(first, 40)
    assert ledger.committed == 48
    assert ledger.acquire(16) == ((0,), (0,)), "a slot with more pages than it reserves starts empty"
    assert ledger.acquire(32) == ((1,), ())
    ledger.give_back(1, 32)
    assert ledger.release_idle() == (1,)
    assert ledger.committed == ledger.reserved == 16


def test_a_move_needs_memory_for_both_copies() -> None:
    tight = SlotLedger(2, 32)
    assert tight.acquire(16) == ((0,), ())
    assert tight.acquire(16) == ((1,), ())
    tight.give_back(0, 16)
    assert tight.move(1, 0) == ()
    assert tight.free == {1}
    full = SlotLedger(2, 16)
    assert full.acquire(16) == ((0,), ())
    assert full.move(0, 1) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_in_a_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    ledger = SlotLedger(rng.randint(1, 8), 16 * rng.randint(2, 40))
    held: dict[int, int] = {}
    for _ in range(500):
        choice = rng.random()
        if choice < 0.5 and (placed := ledger.acquire(size := rng.randint(1, ledger.budget))):
            ((slot,), _) = placed
            assert slot not in held
            held[slot] = size
        elif choice < 0.8 and held:
            slot = rng.choice(sorted(held))
            ledger.give_back(slot, rng.randint(0, held.pop(slot)))
        elif choice < 0.9 and held and ledger.free:
            source, destination = rng.choice(sorted(held)), rng.choice(sorted(ledger.free))
            if ledger.move(source, destination) is not None:
                held[destination] = held.pop(source)
        elif choice > 0.98:
            ledger.release_idle()
        assert ledger.reserved <= ledger.committed <= ledger.budget
        assert ledger.reserved == sum(map(rounded, held.values()))
        assert ledger.free == set(range(ledger.num_slots)) - set(held)
