"""The TensorRT runtime: loads a package's engines on an NVIDIA GPU and runs them over slots in its memory."""
