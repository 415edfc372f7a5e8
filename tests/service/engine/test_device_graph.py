"""The device's step graph, on the host's memory, against the CPU's: the same runs give the same bits."""

import threading

import numpy as np
import pytest

from attendant.bundle import DType
from service.bundle import BundleRefused, FoundBundle
from service.engine.binding import Binding
from service.engine.captures import EAGER, captured_ids, warm_up
from service.engine.device import HostDevice
from service.engine.device_graph import DeviceGraph, DownloadedGraph
from service.engine.graph import feed
from service.engine.pools import device_slots
from service.engine.probe import generation_probe
from service.engine.runtime import require_cuda, require_cuda_build, use_threads
from service.engine.step_graph import StepGraph
from service.scheduling.row_buckets import bucket_of, row_buckets

SLOTS, CAPACITY = 7, 96


@pytest.fixture(scope="module")
def tiny(tiny_bundles: dict[str, FoundBundle]) -> FoundBundle:
    use_threads(2)
    return tiny_bundles["fp32"]


@pytest.fixture(scope="module")
def cpu(tiny: FoundBundle) -> StepGraph:
    return StepGraph(tiny, SLOTS, CAPACITY)


@pytest.fixture(scope="module")
def device(tiny: FoundBundle) -> DownloadedGraph:
    return DownloadedGraph(DeviceGraph(tiny, SLOTS, CAPACITY, HostDevice(), row_buckets(SLOTS)))


def prompt_of(numbers: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in numbers.integers(3, 300, length)]


def same(ours, theirs) -> bool:
    return ours.shape == theirs.shape and bool((ours == theirs).all())


def test_random_steps_give_the_same_bits_as_on_the_cpu(cpu: StepGraph, device: DownloadedGraph) -> None:
    numbers = np.random.default_rng(0)
    lengths = [0] * SLOTS
    for slot in range(SLOTS):
        length = int(numbers.integers(2, 30))
        prompt = prompt_of(numbers, length)
        assert same(device.chunk(slot, prompt, 0), cpu.chunk(slot, prompt, 0))
        lengths[slot] = length
    for _ in range(120):
        kind = numbers.integers(0, 6)
        slot, other = (int(each) for each in numbers.choice(SLOTS, 2, replace=False))
        room = CAPACITY - lengths[slot]
        if kind == 0:  # a prompt's next chunk
            chunk = prompt_of(numbers, min(room, int(numbers.integers(1, 20))))
            if chunk:
                every = bool(numbers.integers(2))
                ours = device.chunk(slot, chunk, lengths[slot], every_position=every)
                assert same(ours, cpu.chunk(slot, chunk, lengths[slot], every_position=every))
                lengths[slot] += len(chunk)
        elif kind == 1:  # a prefix, or a beam
            length = int(numbers.integers(1, lengths[slot] + 1))
            device.copy(slot, other, length)
            cpu.copy(slot, other, length)
            lengths[other] = length
        elif kind == 2:  # a new prompt
            prompt = prompt_of(numbers, int(numbers.integers(1, CAPACITY)))
            device.begin(slot)
            cpu.begin(slot)
            assert same(feed(device, slot, prompt), feed(cpu, slot, prompt))
            lengths[slot] = len(prompt)
        elif kind == 3:  # prompts together
            first, count = min(slot, other), abs(slot - other) + 1
            prompts = [prompt_of(numbers, int(numbers.integers(2, 33))) for _ in range(count)]
            assert same(device.prompts(first, prompts), cpu.prompts(first, prompts))
            lengths[first : first + count] = [len(prompt) for prompt in prompts]
        else:  # decode rows, some of them parked
            first = int(numbers.integers(0, SLOTS)) if kind == 4 else 0
            count = int(numbers.integers(1, SLOTS - first + 1))
            if max(lengths[first : first + count]) == CAPACITY:
                continue
            tokens = prompt_of(numbers, count)
            rows = [length + 1 for length in lengths[first : first + count]]
            real = [row for row in range(count) if numbers.integers(2)]
            assert same(device.decode(tokens, rows, real, first), cpu.decode(tokens, rows, real, first))
            for row in real:
                lengths[first + row] += 1


def test_a_captured_size_answers_as_before(tiny: FoundBundle, cpu: StepGraph) -> None:
    graph = DeviceGraph(tiny, SLOTS, CAPACITY, HostDevice(), row_buckets(SLOTS))
    graph.capture()
    device = DownloadedGraph(graph)
    numbers = np.random.default_rng(1)
    for slot in range(SLOTS):
        prompt = prompt_of(numbers, 5 + slot)
        assert same(feed(device, slot, prompt), feed(cpu, slot, prompt))
    for count in range(1, SLOTS + 1):
        tokens, lengths = prompt_of(numbers, count), [6 + row for row in range(count)]
        assert same(device.decode(tokens, lengths), cpu.decode(tokens, lengths))


def test_runs_of_a_step_leave_their_logits_one_behind_the_other(cpu: StepGraph, device: DownloadedGraph) -> None:
    graph = device.graph
    numbers = np.random.default_rng(2)
    prompts = [prompt_of(numbers, length) for length in (9, 14, 3, 6)]
    rows = [graph.decode([5, 6], [1, 1]), graph.prompts(2, prompts[:2]), graph.chunk(4, prompts[2], 0)]
    rows.append(graph.chunk(5, prompts[3], 0))
    assert rows == [range(2), range(2, 4), range(4, 5), range(5, 6)]
    taken = graph.take()
    assert taken == range(6) and graph.take() == range(0)
    expected = [
        *cpu.decode([5, 6], [1, 1]).copy(),
        *cpu.prompts(2, prompts[:2]),
        *cpu.chunk(4, prompts[2], 0),
        *cpu.chunk(5, prompts[3], 0),
    ]
    assert same(graph.download(taken), np.stack(expected))


def test_the_probe_answers_on_a_device_as_on_the_cpu(tiny: FoundBundle, device: DownloadedGraph) -> None:
    generation_probe(tiny, device).check(3)


def test_what_a_device_does_not_serve_is_refused_with_the_reason(byte_bundles: dict[str, FoundBundle]) -> None:
    for rule in ("ring", "replace"):
        with pytest.raises(BundleRefused, match=f"states of the rule {rule}: on a device"):
            DeviceGraph(byte_bundles[rule], 2, 64, HostDevice())


def test_a_type_that_numpy_lacks_is_bound_by_address(tiny: FoundBundle) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    half = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["n", 4]) for name in ("x", "z")]
    nodes = [
        helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["y"], ["z"], to=TensorProto.BFLOAT16),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "halves", half[:1], half[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    device = HostDevice()
    numbers = np.arange(24, dtype=np.uint16).reshape(6, 4) * 512
    source, destination = (device.allocate((6, 4), DType.BFLOAT16) for _ in range(2))
    device.upload(numbers, source)
    binding = Binding(session)
    binding.input("x", source[2:5])
    binding.output("z", destination[1:4])
    binding.run()
    found = np.zeros((6, 4), np.uint16)
    device.download(destination, found)
    device.synchronize()
    assert (found[1:4] == numbers[2:5]).all() and not found[0].any() and not found[4:].any()


def test_asking_for_cuda_here_is_refused_with_what_is_missing(tiny: FoundBundle) -> None:
    class Cuda(HostDevice):
        name = "cuda"

    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is the GPU build of ONNX Runtime")
    with pytest.raises(BundleRefused, match="install onnxruntime-gpu instead of onnxruntime"):
        DeviceGraph(tiny, 2, 64, Cuda())


def test_a_session_that_fell_back_to_the_cpu_is_refused(cpu: StepGraph) -> None:
    with pytest.raises(BundleRefused, match="runs it with CPUExecutionProvider: the NVIDIA driver, a GPU"):
        require_cuda(cpu._session.get_providers())
    require_cuda(["CUDAExecutionProvider", "CPUExecutionProvider"])
    require_cuda_build(["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"])


def test_the_budget_decides_how_many_slots_there_are(tiny: FoundBundle) -> None:
    # 3 layers of keys and values, 2 heads of 16 float32 at each of 288 positions
    slot = 3 * 2 * 2 * 16 * 4 * 288
    assert device_slots(tiny.manifest, 8, slot) == 1
    assert device_slots(tiny.manifest, 8, 5 * slot - 1) == 4
    assert device_slots(tiny.manifest, 8, 100 * slot) == 8
    with pytest.raises(ValueError, match=rf"kv_memory is {slot - 1} bytes, must be at least {slot}: one slot of tiny"):
        device_slots(tiny.manifest, 8, slot - 1)


def test_every_number_of_rows_has_the_smallest_size_that_holds_it() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(7) == (1, 2, 4, 7)
    assert row_buckets(8) == (1, 2, 4, 8)
    assert row_buckets(33) == (1, 2, 4, 8, 12, 16, 24, 32, 33)
    for num_slots in range(1, 200):
        buckets = row_buckets(num_slots)
        assert sorted(set(buckets)) == list(buckets) and buckets[-1] == num_slots
        for num_rows in range(1, num_slots + 1):
            size = bucket_of(num_rows, buckets)
            assert size in buckets and num_rows <= size < 2 * num_rows
    assert bucket_of(5, ()) == 5


def test_runs_are_captured_while_nobody_else_uses_a_device(tiny: FoundBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = DeviceGraph(tiny, SLOTS, CAPACITY, HostDevice(), row_buckets(SLOTS))
    run, other = DeviceGraph._decode, HostDevice()
    inside: list[tuple[int, bool]] = []
    others: list[threading.Thread] = []

    def decode(self, token_ids, lengths, first_slot, graph_id) -> None:
        came_in = threading.Event()

        def use_another_device() -> None:
            with other.turns.together():
                came_in.set()

        others.append(threading.Thread(target=use_another_device))
        others[-1].start()
        if graph_id == EAGER:
            assert came_in.wait(30)
        run(self, token_ids, lengths, first_slot, graph_id)
        inside.append((graph_id, came_in.is_set()))

    monkeypatch.setattr(DeviceGraph, "_decode", decode)
    monkeypatch.setattr(DeviceGraph, "_verify", lambda self, num_rows, graph_id: None)
    graph.capture()
    for thread in others:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted({each for each, _ in inside}) == [EAGER, *captured_ids(row_buckets(SLOTS)).values()]
    assert all(came_in == (graph_id == EAGER) for graph_id, came_in in inside)


def test_every_size_is_captured_once_after_two_eager_runs_the_largest_first() -> None:
    for num_slots in range(1, 70):
        buckets = row_buckets(num_slots)
        ids = captured_ids(buckets)
        runs = list(warm_up(buckets))
        assert len(set(ids.values())) == len(buckets) and min(ids.values()) > 0 and ids.keys() == set(buckets)
        assert [rows for rows, _ in runs] == sorted([*buckets] * 3, reverse=True)
        for first in range(0, len(runs), 3):
            rows = runs[first][0]
            assert runs[first : first + 3] == [(rows, EAGER), (rows, EAGER), (rows, ids[rows])]
