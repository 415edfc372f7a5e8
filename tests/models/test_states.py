"""States: declarations, chunks, and writes that equal writing one token after another."""

import math
import random

import pytest
import torch

from models.states import (
    CAPACITY,
    SOURCE,
    Chunk,
    State,
    StateRule,
    StateSpec,
    append,
    ring_positions,
    ring_write,
)

KEY = StateSpec(name="key", rule=StateRule.APPEND, dtype=torch.float16, shape=(2, CAPACITY, 4))
RING = StateSpec(name="ring", rule=StateRule.RING, dtype=torch.float32, shape=(2, 3, 4), window=3)
SUMS = StateSpec(name="sums", rule=StateRule.REPLACE, dtype=torch.float32, shape=(5,))
MEMORY = StateSpec(name="memory", rule=StateRule.FIXED, dtype=torch.float32, shape=(2, SOURCE, 4))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chunk(starts, lengths, width):
    return Chunk(start=torch.tensor(starts), lengths=torch.tensor(lengths), num_tokens=width)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ring", [False, True], ids=["append", "ring"])
def test_writing_chunks_equals_writing_one_token_after_another(ring, seed):
    draw = random.Random(seed)
    capacity, rows = (draw.choice([1, 2, 3, 5, 8]), 4) if ring else (40, 4)
    past = torch.zeros(rows, 1, capacity, 1)
    expected, consumed = past.clone(), [0] * rows
    for step in range(6):
        width = draw.choice([0, 1, 2, 6])
        lengths = [draw.randint(0, width) for _ in range(rows)]
        new = torch.full((rows, 1, width, 1), math.nan)  # padding may hold anything
        for row, length in enumerate(lengths):
            for index in range(length):
                value = 100 * row + consumed[row] + index + 1
                new[row, 0, index] = value
                expected[row, 0, (consumed[row] + index) % capacity] = value
        before, write = past.clone(), ring_write if ring else append
        written = write(past, new, chunk(consumed, lengths, width))
        assert torch.equal(past, before), f"step {step} wrote in place"
        assert torch.equal(written, expected)
        past, consumed = written, [start + length for start, length in zip(consumed, lengths, strict=True)]
        if ring:
            held = ring_positions(torch.tensor(consumed), capacity)
            for row, slots in enumerate(held.tolist()):
                for slot, position in enumerate(slots):
                    assert (position < 0) == (expected[row, 0, slot] == 0)
                    assert position < 0 or expected[row, 0, slot] == 100 * row + position + 1


def test_a_chunk_continues_where_its_rows_stand():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    whole = Chunk.of(ids)
    assert (whole.positions.tolist(), whole.valid.tolist()) == ([[0, 1, 2]], [[True] * 3])
    ragged = Chunk.of(ids, torch.tensor([3, 1]), torch.tensor([0, 40]))
    assert ragged.positions.tolist() == [[0, 1, 2], [40, 41, 42]]
    assert ragged.valid.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 4], r"lengths \[1, 4\] must lie in 0\.\.3, the tokens given"),
        ([-1, 2], r"must lie in 0\.\.3"),
        ([1, 2, 3], r"lengths has shape \(3,\); token_ids has 2 rows"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        Chunk.of(torch.zeros(2, 3, dtype=torch.int64), torch.tensor(lengths))


@pytest.mark.parametrize(
    ("rule", "shape"),
    [
        (StateRule.APPEND, (2, 4)),
        (StateRule.RING, (2, CAPACITY, 4)),
        (StateRule.REPLACE, (SOURCE,)),
        (StateRule.FIXED, (CAPACITY,)),
    ],
)
def test_a_rule_and_a_shape_that_exclude_each_other_are_refused(rule, shape):
    with pytest.raises(ValueError, match=f"state x: rule {rule} with shape"):
        StateSpec(name="x", rule=rule, dtype=torch.float32, shape=shape)


def test_shapes_and_costs_follow_from_the_declaration():
    assert KEY.row_shape(7) == (2, 7, 4)
    assert MEMORY.row_shape(7, 9) == (2, 9, 4)
    assert [spec.bytes_per_token for spec in (KEY, RING, SUMS, MEMORY)] == [2 * 4 * 2, 0, 0, 0]


def test_an_empty_state_is_zero_except_for_what_is_already_made():
    memory = torch.randn(3, 2, 6, 4)
    state = State.empty(
        (KEY, RING, SUMS, MEMORY), 3, 7, torch.device("cpu"), fixed={"memory": memory},
        source_lengths=torch.tensor([6, 0, 2]),
    )  # fmt: skip
    assert state.tensors["memory"] is memory
    assert state.tensors["key"].dtype == torch.float16
    for spec in (KEY, RING, SUMS):
        assert state.tensors[spec.name].shape == (3, *spec.row_shape(7))
        assert (state.tensors[spec.name] == 0).all()
    assert state.lengths.tolist() == [0, 0, 0]
    assert state.source_valid.sum(1).tolist() == [6, 0, 2]
    assert state.source_valid[2].tolist() == [True, True, False, False, False, False]
    assert state.num_bytes == 3 * (2 * 7 * 4 * 2 + (2 * 3 * 4 + 5 + 2 * 6 * 4) * 4)
    with pytest.raises(KeyError, match="memory"):
        State.empty((MEMORY,), 3, 7, torch.device("cpu"))


def test_rows_are_selected_from_every_tensor_and_count():
    memory = torch.randn(3, 2, 6, 4)
    state = State.empty(
        (SUMS, MEMORY), 3, 7, torch.device("cpu"), fixed={"memory": memory}, source_lengths=torch.tensor([6, 0, 2])
    )
    state = state.advance(chunk([0, 0, 0], [4, 1, 2], 4), {"sums": torch.arange(15.0).reshape(3, 5)})
    chosen = state.select(torch.tensor([2, 0, 2, 2]))
    assert chosen.lengths.tolist() == [2, 4, 2, 2]
    assert chosen.source_lengths.tolist() == [2, 6, 2, 2]
    assert chosen.tensors["sums"][:, 0].tolist() == [10, 0, 10, 10]
    assert torch.equal(chosen.tensors["memory"][1], memory[0])
    plain = State.empty((SUMS,), 2, 7, torch.device("cpu"))
    assert (plain.source_valid, plain.select(torch.tensor([1])).source_lengths) == (None, None)


def test_a_step_keeps_what_it_did_not_produce_and_leaves_the_state_it_was_given():
    state = State.empty((SUMS, RING), 2, 7, torch.device("cpu"))
    later = state.advance(chunk([0, 0], [3, 0], 3), {"sums": torch.ones(2, 5)})
    assert (state.lengths.tolist(), later.lengths.tolist()) == ([0, 0], [3, 0])
    assert (state.tensors["sums"] == 0).all()
    assert later.tensors["ring"] is state.tensors["ring"]
