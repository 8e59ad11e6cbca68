"""The GPU architectures that kernels are compiled for: what a program may have there, and which devices run the code.

A table that imports nothing of the compiler: the runtime reads it to say what a device needs.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        gpus: of those that have it, by name.
        processors: multiprocessors of the last one named (data sheets; B300 and GB300 as B200), which the rule of
            block sizes has in mind.
        shared_bytes: dynamic shared memory that a program can have on every device that runs the code.
        reach: inputs that a program has on the way at once: a row of `small`, where 16 rows of activations fit beside
            them.
        driver: the first one that knows it, as `cuDriverGetVersion` counts: 12080 is CUDA 12.8.
        also: other compute capabilities whose devices run its machine code.
    """

    gpus: str
    processors: int
    shared_bytes: int
    reach: int
    driver: int
    also: tuple[int, ...] = ()


#: By compute capability, 90 for 9.0. Code for 8.0 runs on later 8.x (but for Tegra's 8.7), so it keeps to what 8.6 and
#: 8.9 have; Triton makes the others' of instructions that no other device need have (sm_90a, sm_100a, …).
ARCHITECTURES = {
    80: Architecture("A100; 8.6: A10, A40, RTX 30", 108, 101376, 512, 11010, also=(86, 89)),
    89: Architecture("L4, L40S, RTX 40", 142, 101376, 512, 11080),
    90: Architecture("H100, H200, GH200", 132, 232448, 1024, 11080),
    100: Architecture("B200, GB200", 148, 232448, 1024, 12080),
    103: Architecture("B300, GB300", 148, 232448, 1024, 12090),
    120: Architecture("RTX 50, RTX PRO Blackwell", 170, 101376, 512, 12080),
    121: Architecture("GB10 (DGX Spark)", 48, 101376, 512, 12090),
}

#: Those whose products keep their sums in tensor memory (`tcgen05`), of which none are in registers.
TENSOR_MEMORY = (100, 103)


def running(device: int, held: Iterable[int] = tuple(ARCHITECTURES)) -> list[int]:
    """Those of `held` whose code a device of this compute capability runs; its own last."""
    fits = [sm for sm in held if sm == device or (sm in ARCHITECTURES and device in ARCHITECTURES[sm].also)]
    return sorted(fits)


def compile_for(device: int, verb: str = "compile the checkpoint with") -> str:
    """What to do about a device of this compute capability that has no machine code."""
    if fits := running(device):
        return f"{verb} --target triton:sm{fits[-1]}"
    known = ", ".join(f"sm{sm} ({one.gpus})" for sm, one in ARCHITECTURES.items())
    return f"use another GPU or another target: kernels are compiled for {known}"
