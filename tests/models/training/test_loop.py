"""Schedule and metrics of the training loop."""

import pytest

from models.training.config import OptimiserConfig
from models.training.loop import learning_rate
from models.training.metrics import MetricsLog

CONFIG = OptimiserConfig(
    learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4, weight_decay=0.0, beta1=0.9, beta2=0.9, clip_norm=1.0
)


def test_the_rate_rises_linearly_then_falls_to_its_least_at_the_last_step():
    rates = [learning_rate(step, 25, CONFIG) for step in range(25)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[14] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)


def test_runs_shorter_than_the_warm_up_have_a_rate():
    assert [learning_rate(step, 2, CONFIG) for step in range(2)] == [0.25, 0.5]


def test_a_log_continues_where_the_snapshot_was_and_forgets_what_came_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step, loss=step / 10)
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    assert [record["step"] for record in MetricsLog.read(path)] == [10, 20, 30]
    MetricsLog(path, steps_done=20).write(25, loss=2.5)
    assert MetricsLog.read(path) == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}, {"step": 25, "loss": 2.5}]
    MetricsLog(path)
    assert MetricsLog.read(path) == []
