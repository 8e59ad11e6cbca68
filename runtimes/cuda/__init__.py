"""The CUDA runtime: runs Triton engines with the driver, `cuda-bindings` and numpy; nothing is compiled here."""
