"""The ONNX runtime: runs a package's graphs in ONNX Runtime, behind the same sessions as every other target."""
