"""Trained decoder in, certified bundle out: ONNX graphs, quantisation, the parity certificate and the golden run."""
