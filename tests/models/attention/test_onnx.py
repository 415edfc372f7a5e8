"""Mechanisms in ONNX Runtime: PyTorch's exporter takes them at opset 23, for any batch and length.

Steps with a past are exported as they are taken: a chunk of new tokens and the states before it.
"""

import logging
import warnings

import onnxruntime as ort
import pytest
import torch
from torch import nn

from models.attention.hard import most_likely, take
from models.attention.linear import CHUNK, LinearAttention
from models.attention.mean import MeanAttention
from models.attention.memory import MemoryAttention
from models.attention.multihead import CrossAttention, MultiHeadAttention
from models.attention.normalizers import Tempered, entmax15, hardmax, masked_softmax, sparsemax
from models.attention.positions import Rotary
from models.attention.scores import Additive, Dot, General, ScaledDot
from models.states import Chunk

pytestmark = pytest.mark.slow

WIDTH = 16


class Step(nn.Module):
    """Causal self-attention with its past, flattened for export: (x, start, lengths, states) -> (output, states)."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, start, lengths, *past):
        names = [spec.name for spec in self.attention.state_specs()]
        chunk = Chunk(start=start, lengths=lengths, num_tokens=x.shape[1])
        attended = self.attention(x, chunk, dict(zip(names, past, strict=True)))
        return attended.output, *(attended.present[name] for name in names)


class ToMemory(nn.Module):
    """Attention to a memory, projected in the graph: (x, memory, valid) -> output."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, memory, valid):
        return self.attention(x, self.attention.project(memory), valid)[0]


class Look(nn.Module):
    """Hard attention at inference: (scores, values) -> the value of the best place."""

    def forward(self, scores, values):
        return take(values, most_likely(masked_softmax(scores)).index)


def exported(module, example, shapes, path):
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about itself
        program = torch.onnx.export(
            module.eval(), example, dynamo=True, opset_version=23, dynamic_shapes=shapes, verbose=False
        )
    program.save(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*arguments):
        feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), arguments, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def assert_same(module, run, *arguments):
    with torch.no_grad():
        expected = module(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(run(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


STEPS = {
    "append": lambda: MultiHeadAttention(WIDTH, 4, num_kv_heads=2, causal=True, rotary=Rotary(4)),
    "append, ALiBi, softcap, QK-norm": lambda: MultiHeadAttention(
        WIDTH, 4, causal=True, alibi=True, softcap=5.0, qk_norm=True
    ),
    "window": lambda: MultiHeadAttention(WIDTH, 4, causal=True, window=5),
    "ring": lambda: MultiHeadAttention(WIDTH, 4, causal=True, window=5, window_state="ring"),
    "favor": lambda: LinearAttention(WIDTH, 4, features="favor", num_features=8, causal=True),
    "elu": lambda: LinearAttention(WIDTH, 4, features="elu", causal=True),
    "mean": lambda: MeanAttention(WIDTH, causal=True),
    "sparsemax": lambda: MultiHeadAttention(WIDTH, 4, causal=True, normalizer=sparsemax),
    "entmax15": lambda: MultiHeadAttention(WIDTH, 4, causal=True, normalizer=entmax15),
    "temperature": lambda: MultiHeadAttention(WIDTH, 4, causal=True, normalizer=Tempered(masked_softmax, 0.5)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_takes_any_rows_tokens_and_past(name, tmp_path):
    torch.manual_seed(0)
    module, capacity = Step(STEPS[name]()), 40
    specs = module.attention.state_specs()

    def arguments(rows, tokens):
        past = [0.5 * torch.rand(rows, *spec.row_shape(capacity)) for spec in specs]
        start = torch.randint(1, capacity - tokens if tokens < capacity else 2, (rows,))
        return torch.randn(rows, tokens, WIDTH), start, torch.randint(1, tokens + 1, (rows,)), *past

    # Linear attention takes all tokens as one chunk, if there are never more.
    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1, max=CHUNK)
    shapes = ({0: rows, 1: tokens}, {0: rows}, {0: rows}, tuple({0: rows} for _ in specs))
    run = exported(module, arguments(2, 3), shapes, tmp_path / "step.onnx")
    for shape in ((1, 1), (3, 7), (2, 20)):
        assert_same(module, run, *arguments(*shape))


TO_MEMORY = {
    "cross": lambda: CrossAttention(WIDTH, 4, d_memory=12),
    "additive": lambda: MemoryAttention(Additive(WIDTH, 12, 8)),
    "general": lambda: MemoryAttention(General(WIDTH, 12)),
    "dot": lambda: MemoryAttention(Dot(WIDTH, WIDTH)),
    "scaled": lambda: MemoryAttention(ScaledDot(WIDTH, WIDTH, learned=True)),
    "additive, arg-max": lambda: MemoryAttention(Additive(WIDTH, 12, 8), hardmax),
}


@pytest.mark.parametrize("name", TO_MEMORY)
def test_attention_to_a_memory_takes_any_rows_queries_and_places(name, tmp_path):
    torch.manual_seed(0)
    module = ToMemory(TO_MEMORY[name]())
    width = WIDTH if name in ("dot", "scaled") else 12

    def arguments(rows, queries, places):
        lengths = torch.randint(1, places + 1, (rows, 1))
        return torch.randn(rows, queries, WIDTH), torch.randn(rows, places, width), torch.arange(places) < lengths

    rows, queries, places = (torch.export.Dim(axis, min=1) for axis in ("rows", "queries", "places"))
    shapes = ({0: rows, 1: queries}, {0: rows, 1: places}, {0: rows, 1: places})
    run = exported(module, arguments(2, 3, 5), shapes, tmp_path / "memory.onnx")
    for shape in ((1, 1, 4), (3, 2, 9), (2, 6, 1)):
        assert_same(module, run, *arguments(*shape))


def test_hard_attention_reads_the_best_of_any_number_of_places(tmp_path):
    torch.manual_seed(0)
    rows, places = (torch.export.Dim(axis, min=1) for axis in ("rows", "places"))
    shapes = ({0: rows, 1: places}, {0: rows, 1: places})
    run = exported(Look(), (torch.randn(2, 5), torch.randn(2, 5, 3)), shapes, tmp_path / "look.onnx")
    for shape in ((1, 1), (4, 9)):
        assert_same(Look(), run, torch.randn(*shape), torch.randn(*shape, 3))
