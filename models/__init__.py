"""PyTorch models: attention mechanisms, architectures, training recipes and readers of pretrained weights.

The room knows neither ONNX nor serving; `export` turns what it makes into bundles.
"""
