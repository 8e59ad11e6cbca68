"""The ONNX target: one graph of standard operators a method, states as explicit inputs and outputs (docs/onnx.md)."""
