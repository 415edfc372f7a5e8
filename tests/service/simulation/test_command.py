"""`python -m service simulate`, from its flags to what it prints."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from service.scheduling.latency import LatencyModel
from service.scheduling.work import decode_work, prefill_work
from service.simulation.command import learned_laws, main
from service.simulation.virtual_engine import Laws

LAW = ["--law", "prefill=0.004,0.0004,1e-8", "--law", "decode=0.004,0.0004,2e-8"]
TRAFFIC = ["--rate", "20", "--duration-seconds", "5", "--most-tokens", "400"]


def learned() -> dict[str, object]:
    """What a server keeps that saw the law of `LAW`."""
    model, draw = LatencyModel(), random.Random(0)
    laws = Laws.parse(LAW[1::2])
    for _ in range(300):
        work = prefill_work(draw.randrange(500), draw.randrange(2, 512))
        model.observe("prefill", work, laws.predict("prefill", work))
        work = decode_work([draw.randrange(1, 900) for _ in range(draw.randrange(1, 32))])
        model.observe("decode", work, laws.predict("decode", work))
    return model.to_dict()


def test_a_trace_a_law_and_a_fleet_make_a_table(capsys: pytest.CaptureFixture[str]):
    assert main([*TRAFFIC, *LAW, "--replicas", "2"]) == 0
    shown = capsys.readouterr().out
    assert "2 replicas" in shown
    assert "finished" in shown
    assert shown.splitlines()[-1].split()[0] == "all"


def test_json_has_the_same_report_and_the_search_for_replicas(capsys: pytest.CaptureFixture[str]):
    assert main([*TRAFFIC, *LAW, "--slo", "ttft_p95<0.3,goodput>0.9", "--budget-seconds", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    needed = found["replicas_needed"]
    assert found["report"]["replicas"] == needed
    assert found["tried"][str(needed)]["ttft_p95<0.3"] < 0.3
    assert found["report"]["total"]["requests"] == sum(one["requests"] for one in found["report"]["by_length"])


def test_too_few_replicas_for_the_objectives_are_a_failure(capsys: pytest.CaptureFixture[str]):
    assert main([*TRAFFIC, *LAW, "--slo", "ttft_p50<1e-6", "--max-replicas", "2"]) == 1
    assert "2 replicas are too few" in capsys.readouterr().out


def test_what_was_drawn_can_be_kept_and_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    assert main([*TRAFFIC, *LAW, "--write-trace", str(trace), "--json"]) == 0
    drawn = capsys.readouterr().out
    assert main(["--trace", str(trace), *LAW, "--json"]) == 0
    assert capsys.readouterr().out == drawn
    assert main(["--trace", str(trace), *LAW, "--json", "--speed", "2"]) == 0
    assert capsys.readouterr().out != drawn


def test_what_a_server_learned_is_the_law(tmp_path: Path):
    (tmp_path / "latency-a.json").write_text(json.dumps({"of": {}, "model": "lm/1", "learned": learned()}))
    (tmp_path / "latency-b.json").write_text(json.dumps({"of": {}, "model": "mlm/1", "learned": {"encode": {}}}))
    laws, expected = learned_laws(tmp_path), Laws.parse(LAW[1::2])
    for phase, work in (("prefill", prefill_work(100, 300)), ("decode", decode_work([200] * 16))):
        assert laws.predict(phase, work) == pytest.approx(expected.predict(phase, work), rel=1e-3)
    (tmp_path / "latency-c.json").write_text(json.dumps({"of": {}, "model": "other/1", "learned": learned()}))
    with pytest.raises(ValueError, match=r"it holds: .*latency-a\.json, .*latency-c\.json; give one file"):
        learned_laws(tmp_path)
    assert learned_laws(tmp_path, "lm/1") == learned_laws(tmp_path / "latency-a.json") == laws


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*LAW], "give --trace FILE, or --rate"),
        ([*TRAFFIC], "give either --state-dir, or --law"),
        ([*TRAFFIC, "--law", "prefill=1,2,3"], "nothing is known of what decode costs"),
        ([*TRAFFIC, "--law", "decode=x"], "'decode=x' is no law; write PHASE="),
        ([*TRAFFIC, *LAW, "--rates", "3"], "unrecognized arguments: --rates 3"),
        ([*TRAFFIC, *LAW, "--trace", "x.csv"], "is of drawn traffic; leave it out, or --trace"),
        ([*TRAFFIC, *LAW, "--replicas", "0"], "must be at least 1"),
        ([*TRAFFIC, *LAW, "--slo", "fast"], "'fast' is no objective"),
        ([*TRAFFIC, "--state-dir", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_command_line_that_cannot_be_taken_says_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_service_simulates_without_loading_what_serves():
    program = (
        "import sys; from service.__main__ import main; status = main(['simulate', *sys.argv[1:]]); "
        "assert not {'onnxruntime', 'grpc', 'torch'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *TRAFFIC, *LAW], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
