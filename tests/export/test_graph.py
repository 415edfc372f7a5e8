"""The served graph against the PyTorch decoder, at shapes that the certificate did not use."""

import numpy as np
import onnx
import pytest
import torch

from export.bundle import CPU_PRECISIONS
from export.certificate import chunk_sizes
from export.runner import Runner

CAPACITY, NUM_ROWS = 90, 4


def runner_of(exported, precision: str, *, num_threads: int = 1) -> Runner:
    path = exported[precision].directory / "step.onnx"
    return Runner(path, num_rows=NUM_ROWS, capacity=CAPACITY, num_threads=num_threads)


def oracle(exported, text: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return exported["fp32"].model.module(torch.from_numpy(text)[None])[0].numpy()


def random_text(seed: int, length: int = CAPACITY) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length)


def near(measured: np.ndarray, expected: np.ndarray) -> bool:
    return float(np.abs(measured - expected).max()) <= 1e-5 * float(np.abs(expected).max())


@pytest.mark.parametrize("chunks", [[90], [2, 88], [30, 31, 29], [11, 13, 17, 19, 30], [1] * 6])
def test_a_prompt_in_any_chunks_has_the_logits_of_the_decoder(exported, chunks):
    runner, text = runner_of(exported, "fp32"), random_text(1)
    expected, end = oracle(exported, text), 0
    for size in chunks:
        logits = runner.step(text[None, end : end + size], [end + size], np.arange(size))
        assert near(logits, expected[end : end + size])
        end += size


def test_rows_of_any_lengths_decode_together(exported):
    runner, generator = runner_of(exported, "fp32"), np.random.default_rng(2)
    for _ in range(5):
        num_rows = int(generator.integers(1, NUM_ROWS + 1))
        lengths = generator.integers(1, CAPACITY - 2, num_rows)
        texts = [generator.integers(0, 256, length + 2) for length in lengths]
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            runner.prefill(text[:length], row=row)
        for step in range(2):
            tokens = [[text[length + step]] for text, length in zip(texts, lengths, strict=True)]
            logits = runner.step(tokens, lengths + step + 1)
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
                assert near(logits[row], oracle(exported, text)[length + step])


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_logits_are_those_of_the_positions_asked_for_in_that_order(exported, precision):
    runner, text = runner_of(exported, precision), random_text(3, 20)
    every = runner.all_logits(text)
    wanted = [19, 0, 7, 7]
    assert np.array_equal(runner.step(text[None], [20], wanted), every[wanted])


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_neighbours_chunks_and_threads_change_no_bit(exported, precision):
    generator = np.random.default_rng(4)
    one, two = (runner_of(exported, precision, num_threads=threads) for threads in (1, 2))
    texts = [generator.integers(0, 256, CAPACITY) for _ in range(NUM_ROWS)]
    lengths = np.array([5, 88, 31, 60])
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        alone = one.prefill(text[:length], row=row)
        chunks = chunk_sizes(int(length), int(generator.integers(4, length)) if length > 5 else 3)
        assert np.array_equal(alone, two.prefill(text[:length], row=row, chunks=chunks))
    tokens = [[text[length]] for text, length in zip(texts, lengths, strict=True)]
    together = two.step(tokens, lengths + 1)
    for row in range(NUM_ROWS):
        alone = one.step(tokens[row : row + 1], lengths[row : row + 1] + 1, first_row=row)
        assert np.array_equal(alone[0], together[row])


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_a_step_writes_its_own_positions_of_its_own_rows_only(exported, precision):
    runner, text = runner_of(exported, precision), random_text(5)
    for row in range(NUM_ROWS):
        runner.prefill(text[: 10 + row], row=row)
    before = {name: state.copy() for name, state in runner.states.items()}
    runner.step(text[None, 12:15], [15], first_row=2)
    for name, state in runner.states.items():
        changed = np.argwhere((state != before[name]).any(axis=(1, 3)))
        assert {tuple(where) for where in changed.tolist()} == {(2, 12), (2, 13), (2, 14)}


def test_an_8_bit_graph_finds_the_text_as_likely_as_the_decoder_does(exported):
    # Logits are not held to a bound; a wrong sign, order or scale anywhere is far outside this one.
    runner, text = runner_of(exported, "int8"), random_text(6)
    measured, expected = runner.all_logits(text), oracle(exported, text)
    assert np.corrcoef(measured.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_a_session_loads_without_a_warning(exported, precision, capfd):
    runner_of(exported, precision)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_the_graph_is_valid_onnx_with_named_axes(exported, precision):
    path = exported[precision].directory / "step.onnx"
    model = onnx.load(path, load_external_data=False)
    axes = {
        tensor.name: [axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
        for tensor in (*model.graph.input, *model.graph.output)
    }
    config = exported[precision].model.module.config
    assert axes["token_ids"] == ["rows", "tokens"]
    assert axes["logits"] == ["logit_rows", 256]
    assert axes["past.1.value"] == axes["present.1.value"] == ["rows", config.num_kv_heads, "capacity", config.head_dim]
    assert not model.functions


def test_tied_embeddings_are_stored_once(exported):
    config = exported["fp32"].model.module.config
    model = onnx.load(exported["fp32"].directory / "step.onnx", load_external_data=False)
    shape = [config.vocab_size, config.d_model]
    tables = [tensor.name for tensor in model.graph.initializer if list(tensor.dims) == shape]
    assert len(tables) == (1 if config.tie_embeddings else 2)


def test_an_8_bit_graph_stores_no_matrix_in_floats(exported):
    config = exported["int8"].model.module.config
    model = onnx.load(exported["int8"].directory / "step.onnx", load_external_data=False)
    floats = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and min(tensor.dims) > 16
    ]
    # Position tables stay as they are.
    assert all(list(tensor.dims) == [config.max_model_len, config.d_model] for tensor in floats)
