"""Work is counted so that a prompt costs attention the same however it is cut."""

from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.plan import Chunk, Encode, Row, StepPlan
from service.scheduling.request import Source
from service.scheduling.work import Work, encode_work, plan_work, prefill_work


@given(st.lists(st.integers(1, 600), min_size=1, max_size=20), st.integers(0, 5000))
def test_chunks_attend_as_much_as_the_prompt_they_are_of(lengths: list[int], cached: int) -> None:
    attended, start = 0.0, cached
    for length in lengths:
        attended += prefill_work(start, length).attended
        start += length
    assert attended == prefill_work(cached, sum(lengths)).attended


def test_the_work_of_a_plan_counts_parked_rows_and_padding_and_every_chunk() -> None:
    rows = (Row("a", (1,), 0, 40, None), Row(None, (0,), 0, 7, None), Row("b", (1,), 0, 3, None))
    chunks = (Chunk("c", 4, 100, (1,) * 20, None), Chunk("d", 5, 0, (1,) * 8, None))
    encodes = (Encode("e", 6, Source((1,) * 5)), Encode("f", 7, Source((1,) * 9)))
    assert plan_work(StepPlan(rows=rows, chunks=chunks, encodes=encodes)) == {
        "encode": Work(1, 18, 162),
        "prefill": Work(2, 28, 20 * 110 + 8 * 4),
        "decode": Work(1, 3, 50),
    }
    assert plan_work(StepPlan()) == {}


def test_an_image_without_tokens_is_work_all_the_same() -> None:
    encodes = (Encode("e", 0, Source(pixels=b"abcd")), Encode("f", 1, Source(pixels=b"abcd")))
    assert plan_work(StepPlan(encodes=encodes)) == {"encode": encode_work(2, 1)}
