"""`make demo` does what it shows."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_demo_answers_shows_latency_by_length_and_stops_its_server(smollm2_repository):
    demo = [sys.executable, Path(__file__).with_name("demo.py"), smollm2_repository]
    done = subprocess.run(demo, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "READY smollm2-135m/1",
        "tokens/s, ended by",
        "<= 64",
        "<= 2048",
        " 0.689  'A man",
        "stopped cleanly",
    ):
        assert shown in done.stdout


def test_the_demo_fails_loudly_where_there_is_nothing_to_serve(tmp_path):
    demo = [sys.executable, Path(__file__).with_name("demo.py"), tmp_path]
    done = subprocess.run(demo, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "holds no bundle" in done.stdout and "the server did not start" in done.stderr
