"""GPU kernels in Triton for the canonical and fused ops: compiled ahead of time, checked by Triton's interpreter.

    lower(Call(...)) -> Lowered              registry.py: which kernels run an op, with every number of the launch
    compile_variant(variant) -> Compiled     variants.py: machine code and its figures, no GPU needed
    open_interpreter() -> Interpreter        worker.py: runs the same launches on host memory

A runtime sees machine code and launches, and imports nothing of this but the table in architectures.py.
docs/triton-kernels.md is the map.
"""
