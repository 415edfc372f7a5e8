"""Running plans on ONNX Runtime: state pools, bindings, sampling, and the checks a bundle passes before it serves."""
