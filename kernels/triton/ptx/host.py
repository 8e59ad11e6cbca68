"""A machine that runs launches by their PTX, over memory of this process.

    with PtxMachine(90) as machine:
        x = machine.array((4, 192), np.float32)
        machine.run([launch], {("input", "0"): x, ...})

It takes what the interpreter takes (worker.py), compiles each variant for one architecture, and runs it thread by
thread (machine.py). Beside the interpreter's checks it finds accesses that are not aligned, hazards in shared memory,
copies that nobody waited for, and launches that overlap and read what a launch wrote before they wait.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tmlc.errors import KernelError
from tmlc.kernels.triton.host_memory import DEFAULT_BYTES, Buffers, HostMemory
from tmlc.kernels.triton.launch import Launch, Variant
from tmlc.kernels.triton.ptx.conflicts import Conflicts
from tmlc.kernels.triton.ptx.machine import Kernel, run_kernel
from tmlc.kernels.triton.ptx.memory import BASE, CHUNK, Fault, Global
from tmlc.kernels.triton.ptx.text import parse
from tmlc.kernels.triton.variants import Assembly, ptx_of


class PtxMachine(HostMemory):
    """Runs kernels as they are compiled for the architecture `sm`.

    Args:
        conflicts: counts the turns of shared memory of all launches; slow.
    """

    def __init__(self, sm: int, nbytes: int = DEFAULT_BYTES, conflicts: Conflicts | None = None) -> None:
        super().__init__(nbytes)
        self.sm, self.conflicts = sm, conflicts
        self._kernels: dict[Variant, tuple[Kernel, Assembly]] = {}
        self._written = np.zeros(-(-nbytes // CHUNK), np.bool_)

    def run(
        self, launches: Iterable[Launch], buffers: Buffers, signatures: Iterable[tuple[str, ...]] | None = None
    ) -> None:
        """Runs launches in order; buffers as `places` takes them.

        Args:
            signatures: of the launches, where they were compiled for less than `Launch.signature` says.

        Raises:
            EmitError: a launch names a buffer that is not there or too small, or a kernel has an instruction that is
                not known here.
            KernelError: a kernel did what a GPU would refuse, or what goes wrong there now and then.
        """
        launches = list(launches)
        for launch, signature in zip(launches, signatures or (one.signature() for one in launches), strict=True):
            args, ranges = self.places(launch, buffers)
            kernel, assembly = self._kernel(replace(launch.variant(self.sm), signature=signature))
            values = [
                arg + BASE if kind[0] == "*" and not isinstance(arg, float) else arg
                for kind, arg in zip(signature, args, strict=True)
            ]
            memory = Global(self._base, [(first + BASE, last + BASE) for first, last in ranges], self._written)
            try:
                with np.errstate(all="ignore"):
                    run_kernel(
                        kernel, launch.grid, 32 * assembly.num_warps, values, memory, assembly.shared, launch.overlap,
                        self.conflicts,
                    )  # fmt: skip
            except Fault as fault:
                fix = "correct the kernel: docs/triton-kernels.md, “Checks without a GPU”, says what each hazard is"
                raise KernelError(f"{launch.kernel}: {fault}", where=f"PTX for sm{self.sm}", fix=fix) from fault

    def release(self, mark: int) -> None:
        self._written[mark // CHUNK : -(-self.mark() // CHUNK)] = False  # the rest of it takes no memory
        super().release(mark)

    def _kernel(self, variant: Variant) -> tuple[Kernel, Assembly]:
        if variant not in self._kernels:
            assembly = ptx_of(variant)
            self._kernels[variant] = Kernel(parse(assembly.ptx)), assembly
        return self._kernels[variant]

    def __enter__(self) -> "PtxMachine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
