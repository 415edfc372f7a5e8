"""Beside computing, a server forgets who hangs up, finds beginnings, counts by length, and gives memory back."""

import contextlib

import onnxruntime
import pytest

from attendant.v1 import generation_pb2 as pb
from attendant.v1 import model_service_pb2 as models_pb
from tests.end_to_end.conftest import Server

MEBIBYTE = 1 << 20
SLOTS = 16


def test_a_client_that_hangs_up_frees_its_slot(served, eventually) -> None:
    before = served.value("requests_finished_total", reason="cancelled")
    made = served.value("tokens_total", kind="output")
    for _ in range(3):
        calls = [served.ask([5, 6, number + 7], 240) for number in range(SLOTS + 4)]
        assert all(next(call).WhichOneof("event") == "started" for call in calls)
        for call in calls:
            call.cancel()
        eventually(served.is_idle)
    cancelled = served.value("requests_finished_total", reason="cancelled") - before
    assert 0 < cancelled <= 3 * (SLOTS + 4)
    assert served.value("tokens_total", kind="output") - made < 240 * 3 * (SLOTS + 4)
    assert served.read(served.ask([5, 6], 5))[1].output_tokens == 5


def test_a_prompt_that_begins_as_an_earlier_one_is_computed_from_where_they_part(served) -> None:
    ids = [40 + number % 50 for number in range(120)]
    assert served.read(served.ask(ids, 8))[1].cached_tokens == 0
    before = served.value("tokens_total", kind="prompt_cached")
    usage = served.read(served.ask([*ids, 7, 8, 9], 8))[1]
    assert (usage.prompt_tokens, usage.cached_tokens) == (123, 120)
    assert served.value("tokens_total", kind="prompt_cached") == before + 120
    # While one goes on in that slot, another has to take a copy.
    going_on = served.ask([*ids, 7, 8, 9, 10], 100)
    assert next(going_on).WhichOneof("event") == "started"
    assert next(going_on).WhichOneof("event") == "delta"
    assert served.read(served.ask([*ids, 11, 12], 8))[1].cached_tokens >= 120
    list(going_on)


def test_latency_is_counted_by_length(served, eventually) -> None:
    lengths = {"64": (5, 64), "128": (65, 100, 128), "+Inf": (129, 200)}
    families = ("time_to_first_token", "request_duration", "request_queue", "request_prefill")

    def counted(bucket: str) -> list[float]:
        return [served.value(f"{family}_seconds_count", seq_bucket=bucket) for family in families]

    before = {bucket: counted(bucket) for bucket in lengths}
    gaps = served.value("inter_token_latency_seconds_count")
    steps = served.value("step_seconds_count", phase="decode")
    for number in (number for numbers in lengths.values() for number in numbers):
        served.read(served.ask([number + 20] * number, 4))
    eventually(served.is_idle)
    for bucket, numbers in lengths.items():
        assert [now - then for now, then in zip(counted(bucket), before[bucket], strict=True)] == [len(numbers)] * 4
    assert served.value("inter_token_latency_seconds_count") == gaps + 3 * 7
    assert served.value("step_seconds_count", phase="decode") >= steps + 3 * 7
    assert served.value("latency_model_observations", phase="decode") > 0


def test_memory_stays_at_the_level_of_the_first_full_house(served, eventually) -> None:
    def full_house(turn: int) -> float:
        calls = [served.ask([turn * 20 + slot] * 200, 50) for slot in range(SLOTS)]
        for call in calls[:-4]:
            assert served.read(call)[1].output_tokens == 50
        for call in calls[-4:]:
            call.cancel()
        eventually(served.is_idle)
        return served.memory_bytes

    level = full_house(1)
    assert all(full_house(turn) <= level + 32 * MEBIBYTE for turn in range(2, 6))


def test_the_models_entry_says_what_was_measured_at_load(served) -> None:
    model = served.server.models.GetModel(models_pb.GetModelRequest(model=served.model)).model
    checks = {check.name: check for check in model.checks}
    apart = "bits that differ" if served.target == "cpu" else "difference"
    for between in ("one pass and chunks", "a row alone and among others", "a prompt and its copy"):
        check = checks[f"{apart} between {between}"]
        assert check.measured <= check.bound == (0 if served.target == "cpu" else served.found.manifest.golden.bound)
    assert served.value("model_info", target=served.target) == 1


@pytest.mark.parametrize(("precision", "provider", "target"), [("fp16", "cpu", "cuda"), ("fp32", "cuda", "cpu")])
def test_a_bundle_is_refused_by_a_server_of_another_provider(
    precision: str, provider: str, target: str, exported, tmp_path
) -> None:
    found, _ = exported(precision)
    server = Server(found.directory.parents[1], tmp_path / "log", ("--provider", provider))
    with contextlib.closing(server):
        assert server.wait() == 1
    refusal = f"REFUSED lm-{precision}/1: it was made for {target}, this server runs on {provider}"
    assert refusal in server.lines


def test_a_bundle_for_cuda_is_refused_where_cuda_is_not(exported, tmp_path) -> None:
    """ONNX Runtime would compute on the CPU, without a word."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime is the GPU build")
    found, _ = exported("fp16")
    server = Server(found.directory.parents[1], tmp_path / "log", ("--provider", "cuda"))
    with contextlib.closing(server):
        assert server.wait() == 1
    (refusal,) = [line for line in server.lines if line.startswith("REFUSED")]
    assert "cuda" in refusal.lower() and "made for" not in refusal


@pytest.mark.gpu
def test_the_memory_of_a_device_returns_when_the_server_ends(cuda, exported, tmp_path, eventually) -> None:
    import pynvml

    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(device).used)

    before = used()
    found, _ = exported("fp16")
    arguments = ("--provider", "cuda", "--kv-memory", "1GiB", "--max-num-seqs", "64")
    with contextlib.closing(Server(found.directory.parents[1], tmp_path / "log", arguments).wait_ready(300)) as server:
        sampling, stop = pb.SamplingParams(max_tokens=5), pb.StopConditions(ignore_eos=True)
        assert list(server.generate(found.manifest.key, sampling=sampling, stop=stop))
        assert used() > before + 32 * MEBIBYTE
    eventually(lambda: used() < before + 32 * MEBIBYTE)
