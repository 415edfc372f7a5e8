"""Traces as files, and traces that are drawn."""

import re
import statistics
from pathlib import Path

import pytest

from service.simulation.synthetic import Traffic
from service.simulation.trace import Arrival, TraceError, read_trace, write_trace

ARRIVALS = [
    Arrival(arrival_seconds=0.25, prompt_tokens=7, output_tokens=3),
    Arrival(
        arrival_seconds=1.5,
        prompt_tokens=90,
        output_tokens=4,
        max_tokens=64,
        budget_seconds=2.5,
        priority=-3,
        tenant="a, b",
        prefix_group="system",
        prefix_tokens=80,
    ),
]


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.csv"])
def test_a_trace_is_read_as_it_was_written_and_in_order(tmp_path: Path, name: str):
    write_trace(tmp_path / name, reversed(ARRIVALS))
    assert read_trace(tmp_path / name) == ARRIVALS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt_tokens": 3, "output_tokens": 1}', "line 2: arrival_seconds is missing"),
        ('{"arrival_seconds": 0, "prompt_tokens": "x", "output_tokens": 1}', "prompt_tokens is 'x', must be a number"),
        ('{"arrival_seconds": 0, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens is 0, must be at least 1"),
        ('{"arrival_seconds": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival_seconds is -1.0, must be finite"),
        ('{"arrival_seconds": 0, "prompt_tokens": 1, "output_tokens": 5, "max_tokens": 4}', "max_tokens is 4, must be"),
        ('{"arrival_seconds": 0, "prompt_tokens": 1, "output_tokens": 1, "budget": 4}', "unknown field 'budget'"),
        ('{"arrival_seconds": 0, "prompt_tokens": 1, "output_tokens": 1, "budget_seconds": 0}', "must be positive"),
        ("[]", "line 2: unknown field"),
        ("arrival_seconds", "a line is no JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_its_field(tmp_path: Path, line: str, said: str):
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"arrival_seconds": 0, "prompt_tokens": 1, "output_tokens": 1}}\n{line}\n')
    with pytest.raises(TraceError, match=re.escape(said)) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_trace_that_is_empty_or_missing_is_an_error(tmp_path: Path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("arrival_seconds,prompt_tokens,output_tokens\n")
    with pytest.raises(TraceError, match="it has no requests"):
        read_trace(tmp_path / "empty.csv")


def test_drawn_traffic_has_its_rate_its_bursts_and_its_lengths():
    drawn = Traffic(rate=50, duration_seconds=400, burst_factor=2.0, burst_share=0.25, burst_seconds=5, seed=1)
    arrivals = drawn.arrivals()
    assert arrivals == drawn.arrivals()
    assert [a.arrival_seconds for a in arrivals] == sorted(a.arrival_seconds for a in arrivals)
    assert len(arrivals) / 400 == pytest.approx(50, rel=0.03)
    in_bursts = sum(arrival.arrival_seconds % 20 >= 15 for arrival in arrivals)
    assert in_bursts / 100 == pytest.approx(100, rel=0.05)
    short = [a.prompt_tokens for a in arrivals if a.prompt_tokens < drawn.long_tokens]
    assert len(short) / len(arrivals) == pytest.approx(0.95, abs=0.01)
    assert statistics.median(short) == pytest.approx(drawn.prompt_tokens, rel=0.05)
    assert max(a.prompt_tokens for a in arrivals) == drawn.most_tokens


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rate": 0.0}, "rate is 0.0, must be positive"),
        ({"burst_factor": 6.0}, "burst_factor is 6.0, must be in [1, 5]"),
        ({"burst_share": 1.0}, "burst_share is 1.0, must be in (0, 1)"),
        ({"long_share": 1.5}, "long_share is 1.5, must be in [0, 1]"),
        ({"sigma": float("nan")}, "sigma is nan"),
    ],
)
def test_traffic_that_cannot_be_is_an_error(fields: dict[str, float], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        Traffic(**{"rate": 1.0, "duration_seconds": 1.0, **fields})
