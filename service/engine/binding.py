"""Inputs and outputs of a session, bound by address: what a run reads and writes is not looked up again."""

import onnxruntime as ort

from service.engine.device import Array, Buffer


class Binding:
    """One set of bound memory, arrays of the host or buffers of a device.

    ONNX Runtime keeps neither alive: the addresses stay valid as long as this object lives.

    Args:
        session: whose inputs and outputs they are.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.io = session.io_binding()
        self._kept: dict[str, Array | Buffer] = {}

    def input(self, name: str, tensor: Array | Buffer) -> None:
        """Have the runs read an input there."""
        self._kept[name] = tensor
        self.io.bind_input(name, *_place(tensor))

    def output(self, name: str, tensor: Array | Buffer) -> None:
        """Have the runs write an output there."""
        self._kept[name] = tensor
        self.io.bind_output(name, *_place(tensor))

    def run(self, options: ort.RunOptions | None = None) -> None:
        """Run the graph on what is bound."""
        self.session.run_with_iobinding(self.io, options)


def _place(tensor: Array | Buffer) -> tuple[str, int, object, tuple[int, ...], int]:
    """Return what ONNX Runtime is told of a tensor: device, its index, element type, shape, address."""
    if isinstance(tensor, Buffer):
        return tensor.device.name, tensor.device.index, tensor.element_type, tensor.shape, tensor.address
    return "cpu", 0, tensor.dtype.type, tensor.shape, tensor.ctypes.data
