"""The benchmark's own arithmetic and its book-keeping; no figure is judged here."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gpu
import gpu_results
from gpu_cells import (
    CONTEXTS,
    SHAPES,
    WORKSPACE_BYTES,
    Ceilings,
    Shape,
    capacity_for,
    decode_floor,
    groups,
    prefill_floor,
)
from gpu_results import Results, key, tables
from gpu_worker import Worker, WorkerEnded, spread

CEILINGS = Ceilings(bandwidth=4e12, matrix_peak=8e14)
TINY = Shape(
    num_layers=3, d_model=48, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=96, vocab_size=320, tied=False
)  # of tests/conftest.py's bundle


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_as_transformers_has_them(name):
    import torch
    from gpu_transformers import llama_config
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(SHAPES[name], 128))
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[name].parameters


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("llama-")])
def test_shapes_are_those_of_the_bundles_that_are_made_on_the_spot(name):
    import torch

    from models import synthetic
    from models.decoder import Decoder

    config = synthetic.SHAPES[name]
    fields = {field.name for field in dataclasses.fields(Shape)} - {"tied"}
    assert {field: getattr(config, field) for field in fields} == {
        field: getattr(SHAPES[name], field) for field in fields
    }
    assert config.tie_embeddings == SHAPES[name].tied
    assert name == "llama-tiny" or config.max_model_len >= capacity_for(max(CONTEXTS), 32)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == SHAPES[name].parameters


def test_one_row_of_a_7b_is_bound_by_its_weights_and_many_by_the_matrix_units():
    shape = SHAPES["llama-7b"]
    alone = decode_floor(shape, 1, 128, "bf16", CEILINGS)
    assert alone == pytest.approx(2 * shape.multiplied / 4e12, rel=0.01)
    assert decode_floor(shape, 2048, 2, "bf16", CEILINGS) == pytest.approx(2 * shape.multiplied * 2048 / 8e14, rel=0.01)
    prompt = prefill_floor(shape, 8192, "bf16", CEILINGS)
    without_output = 2 * (shape.multiplied - shape.d_model * shape.vocab_size) * 8192
    assert prompt * 8e14 - without_output == pytest.approx(4 * 32 * 32 * 128 * 8192 * 8193 / 2, rel=0.01)


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_no_step_is_cheaper_with_more_rows_or_a_longer_context(rows):
    for shape in SHAPES.values():
        base = decode_floor(shape, rows, 128, "bf16", CEILINGS)
        assert decode_floor(shape, rows + 1, 128, "bf16", CEILINGS) >= base
        assert decode_floor(shape, rows, 2048, "bf16", CEILINGS) > base


@pytest.mark.parametrize("gib", [20, 40, 80, 139, 1000])
def test_cells_are_loaded_once_where_they_fit_and_left_out_where_they_do_not(gib):
    shape, memory = SHAPES["llama-7b"], gib << 30
    made = groups(shape, "bf16", [128, 2048, 8192], [1, 128, 32, 8, 256], 32, memory)
    cells = [(group.context, rows) for group in made for rows in group.rows]
    assert len(set(cells)) == len(cells)
    for context in (128, 2048, 8192):
        row_bytes = capacity_for(context, 32) * shape.kept_per_token * 2
        for rows in (1, 8, 32, 128, 256):
            need = shape.parameters * 2 + rows * row_bytes
            assert ((context, rows) in cells) == (need + WORKSPACE_BYTES <= memory)
            together = any(g.context == context and rows in g.rows and not g.apart for g in made)
            assert together == (2 * need + WORKSPACE_BYTES <= memory)


def told(seconds: float, graph: float | None = None) -> dict[str, object]:
    result = {"step": spread([seconds, seconds * 2, seconds / 2])}
    return {"result": result if graph is None else {**result, "graph": spread([graph])}}


def test_figures_are_kept_after_every_round_and_only_missing_rounds_are_owed(tmp_path):
    path = tmp_path / "deep" / "results.json"
    results = Results.read(path, "llama-7b", "llama-7b", "cuda")
    cell = key("decode", 128, 1)
    assert results.missing(cell, "ours", 3) == 3
    results.record(cell, "ours", told(0.004, 0.0039))
    results.record(cell, "theirs", {"error": "OutOfMemoryError: too large"})
    results.write(path)
    again = Results.read(path, "llama-7b", "llama-7b", "cuda")
    assert again == results
    assert (again.missing(cell, "ours", 3), again.missing(cell, "theirs", 3)) == (2, 0)
    with pytest.raises(ValueError, match="holds llama-7b on cuda: name another file"):
        Results.read(path, "llama-7b", "llama-7b", "cpu")


@pytest.mark.parametrize(("provider", "judged"), [("cuda", True), ("cpu", False)])
def test_targets_are_judged_on_a_gpu_and_nowhere_else(provider, judged):
    results = Results(model="llama-7b", shape="llama-7b", provider=provider, precision="bf16")
    results.ceilings = dataclasses.asdict(CEILINGS)
    floor = decode_floor(SHAPES["llama-7b"], 1, 128, "bf16", CEILINGS)
    results.record(key("decode", 128, 1), "ours", told(floor / 0.85, 0.9 * floor / 0.85))
    results.record(key("decode", 128, 1), "theirs", told(floor / 0.5))
    results.record(key("decode", 128, 128), "ours", told(1.0, 1.0))
    results.record(key("decode", 128, 128), "theirs", {"error": "OutOfMemoryError"})
    results.record(key("prefill", 128, 1), "ours", {"result": {"first_token": 0.01}})
    shown = tables(results)
    first, second = [line for line in shown.splitlines() if line.startswith("| 128 | 1")][:2]
    assert "| 85.0 % | 50.0 % | 10.0 % |" in first
    assert "| 12800 |" in shown
    assert "- decode/128/128, theirs: OutOfMemoryError" in shown
    verdicts = "overhead <= 5%: MISSED, nearer than transformers: met, >= 80%: met"
    assert (verdicts in first) is judged
    assert (">= 60%: MISSED" in second) is judged
    assert ("not judged" in first) is not judged


WORKER = """
import sys, time
sys.path.insert(0, {here!r})
from gpu_worker import answer
def fail(): raise MemoryError("too large")
def leave(): raise SystemExit(7)
def chatter(): print("to nobody"); return "heard"
answer({{"fail": fail, "leave": leave, "chatter": chatter, "hang": lambda: time.sleep(600)}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "side.py"
    path.write_text(WORKER.format(here=str(Path(__file__).parent)))
    return path


def test_a_worker_answers_even_of_failures_and_its_printing_disturbs_nobody(script):
    with Worker(script, time.monotonic() + 60) as worker:
        assert worker.ask("fail") == {"error": "MemoryError: too large"}
        assert worker.ask("chatter") == {"result": "heard"}
        assert gpu.asked(worker, "leave") == {"error": "side ended with 7 while it was to leave"}


def test_a_worker_whose_time_is_over_is_ended_and_that_is_no_result(script):
    with Worker(script, time.monotonic() + 0.5) as worker, pytest.raises(WorkerEnded) as ended:
        gpu.asked(worker, "hang")
    assert ended.value.made_to


def test_a_bundle_that_is_not_there_is_told(tmp_path, capsys):
    given = ["--repository", str(tmp_path), "--model", "llama-7b", "--results", str(tmp_path / "r.json")]
    assert gpu.main([*given, "--provider", "cpu"]) == 1
    assert "holds no sound bundle llama-7b: export it first" in capsys.readouterr().err


def test_a_bundle_of_another_shape_is_told(tiny_repository, tmp_path, capsys):
    given = ["--repository", str(tiny_repository), "--model", "tiny-fp32", "--results", str(tmp_path / "r.json")]
    assert gpu.main([*given, "--provider", "cpu", "--shape", "llama-tiny"]) == 1
    assert "tiny-fp32/1 has not the shape llama-tiny" in capsys.readouterr().err


@pytest.fixture
def device_repository(tiny_repository, tmp_path: Path) -> Path:
    """A repository with tiny-fp32, which also holds what chooses tokens on a device."""
    import hashlib
    import shutil

    from export.sampler import write_sampler

    directory = tmp_path / "repository" / "tiny-fp32" / "1"
    shutil.copytree(tiny_repository / "tiny-fp32" / "1", directory)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    before = set(directory.iterdir())
    manifest["graphs"] += [graph.model_dump(mode="json") for graph in write_sampler(directory, TINY.vocab_size)]
    for file in sorted(set(directory.iterdir()) - before):
        content = file.read_bytes()
        manifest["files"].append(
            {"name": file.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        )
    path.write_text(json.dumps(manifest))
    return tmp_path / "repository"


@pytest.mark.slow
def test_our_side_runs_by_the_devices_path_on_the_hosts_memory(device_repository, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    path = tmp_path / "results.json"
    command = ["--repository", str(device_repository), "--model", "tiny-fp32", "--shape", "tiny", "--provider", "host"]
    command += ["--results", str(path), "--contexts", "32", "--rows", "1", "3", "8", "--steps", "4", "--rounds", "1"]
    assert gpu.main([*command, "--no-compiled", "--memory-gib", "16", "--no-served"]) == 0
    found = json.loads(path.read_text())
    assert found["failed"] == {}
    assert {name: [*sides] for name, sides in found["rounds"].items()} == {
        name: ["ours", "theirs"] for name in (*(key("decode", 32, rows) for rows in (1, 3, 8)), key("prefill", 32, 1))
    }


@pytest.mark.slow
def test_all_of_it_runs_on_the_cpu_stops_when_its_time_is_over_and_goes_on(
    tiny_repository, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    path = tmp_path / "results.json"
    command = ["--repository", str(tiny_repository), "--model", "tiny-fp32", "--shape", "tiny", "--provider", "cpu"]
    command += ["--results", str(path), "--contexts", "16", "32", "--rows", "1", "4", "--steps", "4", "--rounds", "2"]
    command += ["--no-compiled", "--memory-gib", "16"]
    assert gpu.main([*command, "--seconds", "0.5"]) == gpu.UNFINISHED
    assert "run the same command again" in capsys.readouterr().err
    assert gpu.main(command) == 0
    found = json.loads(path.read_text())
    assert found["failed"] == {}
    wanted = {key("decode", context, rows) for context in (16, 32) for rows in (1, 4)}
    wanted |= {key("prefill", context, 1) for context in (16, 32)}
    assert found["rounds"].keys() == wanted
    for name, sides in found["rounds"].items():
        assert {side: len(rounds) for side, rounds in sides.items()} == {"ours": 2, "theirs": 2}, name
    assert {streams: len(rates) for streams, rates in found["served"].items()} == {"1": 2, "32": 2}
    shown = capsys.readouterr().out
    assert "### tiny-fp32, fp32, cpu" in shown
    assert shown.count("not judged") == 4
    # Nothing is left to do: no worker is started.
    monkeypatch.setattr(gpu, "SCRIPTS", {})
    assert gpu.main(command) == 0
    assert json.loads(path.read_text()) == found
    assert gpu_results.SIDES == ("ours", "theirs")
