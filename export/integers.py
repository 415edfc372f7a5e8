"""Proof that every 8-bit linear map of a graph computes exact integer arithmetic on this machine.

The graph is run with the inputs and outputs of its integer products laid open, and everything is computed again in
numpy: the codes from the activations, the sums as whole numbers (in float64, which holds them exactly), the scales.
A processor whose integer kernels saturate fails here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from attendant.bundle import Check
from export.linear import MAX_CODE, ZERO_POINT

NUM_TOKENS = 24
_CODES = 2 * ZERO_POINT - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """Names of the tensors around one integer product.

    `scaled` is the product times the scale of each row, or None where all rows have the constant scale.
    """

    values: str
    scale: str
    codes: str
    weight: str
    code_scale: str
    weight_scale: str
    bias: str | None
    result: str
    scaled: str | None

    @property
    def computed(self) -> list[str]:
        """The tensors that a run yields, rather than the file."""
        rows = [] if self.scaled is None else [self.scale, self.scaled]
        return [self.values, self.codes, self.result, *rows]


def exactness_check(graph: Path, text: NDArray[np.int64]) -> Check:
    """Count the values that differ from exact integer arithmetic, over all integer products of the graph file.

    Raises:
        ValueError: the graph has no integer product.
    """
    model = onnx.load(graph, load_external_data=False)
    products = _products(model)
    if not products:
        raise ValueError(f"{graph.name} has no integer product to check")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    text = text[:NUM_TOKENS]
    tensors = _run(model, graph, products, text)

    def tensor(name: str) -> NDArray[np.generic]:
        return tensors[name] if name in tensors else onnx.numpy_helper.to_array(constants[name], str(graph.parent))

    differing = 0
    for product in products:
        values, scale, codes, result = map(tensor, (product.values, product.scale, product.codes, product.result))
        if product.scaled is not None:
            differing += int((scale != np.abs(values).max(axis=1) * np.float32(1 / MAX_CODE)).sum())
            differing += int((tensor(product.scaled) != result * scale[:, None]).sum())
        per_row = scale if product.scaled is None else scale[:, None]
        expected_codes = np.clip(np.rint(values / per_row) + ZERO_POINT, 0, _CODES)
        differing += int((codes != expected_codes).sum())
        sums = (codes.astype(np.float64) - ZERO_POINT) @ tensor(product.weight).astype(np.float64)
        factors = tensor(product.code_scale) * tensor(product.weight_scale)
        bias = None if product.bias is None else tensor(product.bias)
        differing += int((~_follows(result, sums.astype(np.float32), factors, bias)).sum())
    return Check(
        name="values that differ from exact integer arithmetic",
        measured=float(differing),
        bound=0,
        grid=f"{len(products)} linear maps, {len(text)} tokens: scales, codes, sums and results",
    )


def _follows(
    result: NDArray[np.generic],
    sums: NDArray[np.float32],
    factors: NDArray[np.generic],
    bias: NDArray[np.generic] | None,
) -> NDArray[np.bool_]:
    """Return which results are sums * factors + bias in float32, where product and sum may share one rounding."""
    if bias is None:
        return result == sums * factors
    # The product of two float32 numbers is exact in float64.
    fused = (sums.astype(np.float64) * factors.astype(np.float64) + bias).astype(np.float32)
    return (result == fused) | (result == sums * factors + bias)


def _products(model: onnx.ModelProto) -> list[_Product]:
    producers = {name: node for node in model.graph.node for name in node.output}
    consumers = {name: node for node in model.graph.node for name in node.input}
    constants = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMulIntegerToFloat":
            continue
        codes, weight, code_scale, weight_scale = node.input[:4]
        bias = node.input[6] if len(node.input) > 6 else None
        values, scale = producers[codes].input[:2]
        found.append(
            _Product(
                values=values,
                scale=scale,
                codes=codes,
                weight=weight,
                code_scale=code_scale,
                weight_scale=weight_scale,
                bias=bias,
                result=node.output[0],
                scaled=None if scale in constants else consumers[node.output[0]].output[0],
            )
        )
    return found


def _run(
    model: onnx.ModelProto, graph: Path, products: list[_Product], text: NDArray[np.int64]
) -> dict[str, NDArray[np.generic]]:
    """Run a prefill of `text` and return the tensors around the products, by name."""
    own = [output.name for output in model.graph.output]
    names = sorted({name for product in products for name in product.computed} - set(own))
    codes = {product.codes for product in products}
    for name in names:
        dtype = onnx.TensorProto.UINT8 if name in codes else onnx.TensorProto.FLOAT
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, dtype, None))
    opened = graph.with_name(f"opened-{graph.name}")
    try:
        onnx.save(model, opened)
        session = ort.InferenceSession(opened, providers=["CPUExecutionProvider"])
        feed = dict(_prefill(session, text))
        names += own
        return dict(zip(names, session.run(names, feed), strict=True))
    finally:
        opened.unlink(missing_ok=True)


def _prefill(session: ort.InferenceSession, text: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.generic]]]:
    length = len(text)
    known = {
        "token_ids": text[None],
        "lengths": np.array([length], np.int32),
        "total_length": np.array(length, np.int32),
        "logits_index": np.arange(length),
        "segment_ids": np.zeros((1, length), np.int64),
    }
    for tensor in session.get_inputs():
        if tensor.name in known:
            yield tensor.name, known[tensor.name]
        else:  # a state
            yield tensor.name, np.zeros((1, tensor.shape[1], length, tensor.shape[3]), np.float32)
