"""What calls must read and move: the bytes that times are held against. Of stacked experts those count that a call
really chose, which is read from the device behind the launches that choose, sort or take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmlc.kernels.triton.mode import PARAMETERS
from tmlc.kernels.triton.registry import load_kernels
from tmlc.runtimes.cuda.backend import CudaBackend
from tmlc.runtimes.cuda.driver import Address, KernelLaunch

#: What a launch moves beside its weights. Caches are left out: what of them is read depends on the session.
SPACES = ("arena", "input", "output", "scratch")
DTYPES: dict[str, np.dtype[Any]] = {"*i32": np.dtype(np.int32), "*i64": np.dtype(np.int64)}


def least_share(config: dict[str, Any]) -> float:
    """The part of the experts that any call reads: the choice of one row."""
    shared = config["n_shared_experts"]
    return float((config["num_experts_per_tok"] + shared) / (config["n_routed_experts"] + shared))


def part(kernel: str, share: float) -> float:
    """The part of its weights that a kernel reads: of stacked experts `share`; of a table only rows, which count as
    nothing."""
    return share if kernel.startswith("moe_") else 0.0 if kernel == "embedding_kernel" else 1.0


def weight_bytes(bound: KernelLaunch, kernel: str, share: float) -> int:
    """Bytes of weights that a launch must read."""
    return int(_bytes(bound, ("weight",)) * part(kernel, share))


def spanned(bound: KernelLaunch) -> int:
    """Bytes of everything else that a launch must move: what its pointers span."""
    return _bytes(bound, SPACES)


def _bytes(bound: KernelLaunch, spaces: Sequence[str]) -> int:
    return sum(arg.nbytes for arg in bound.args if isinstance(arg, Address) and arg.space in spaces)


class Experts:
    """The part of its experts that a call reads, launch by launch.

    Attributes:
        share: as the last launch had it that names the experts of its rows; all of them before the first. Kernels that
            take sorted pairs name none: the launch that sorted them does.
    """

    def __init__(self, backend: CudaBackend) -> None:
        load_kernels()
        self._driver, self.share = backend.driver, 1.0
        self._variants = {variant.name: variant for variant in backend.plan.variants}

    def kernel(self, bound: KernelLaunch) -> str:
        """The kernel of a launch."""
        return self._variants[bound.variant].kernel

    def behind(self, bound: KernelLaunch) -> float:
        """The share of a launch that was the last to be asked of the device; waits for it.

        Raises DeviceError where the device is lost.
        """
        variant = self._variants[bound.variant]
        if not variant.kernel.startswith("moe_"):
            return self.share
        names = [name for name in PARAMETERS[variant.kernel] if name not in variant.constexprs]
        kinds = dict(zip(names, bound.signature, strict=True))
        given: dict[str, Any] = {**variant.constexprs, **dict(zip(names, bound.args, strict=True))}
        if isinstance(given.get("experts"), Address):
            chosen = self._read(given["experts"], DTYPES[kinds["experts"].removesuffix(":16")])
            counts = self._read(given["counts"], np.dtype(np.int32))
            # A session's rows are n, of which those of its new positions are live; without n one, and it is.
            n, each = (1, 1) if given["n"] is None else (given["n"], given["per"])
            live = np.arange(n) < counts[:, None] * each
            self.share = len(np.unique(chosen.reshape(len(counts), n, -1)[live])) / given["count_e"]
        return self.share

    def _read(self, address: Address, kind: np.dtype[Any]) -> np.ndarray:
        host = np.empty(address.nbytes // kind.itemsize, kind)
        self._driver.to_host(host, address.value)
        self._driver.synchronize()
        return host


def weights_read(backend: CudaBackend, launches: Sequence[KernelLaunch]) -> int:
    """Bytes of weights that a call must read whose upload is in place, of chains each time that a method runs: its
    launches run one after the other."""
    experts, total = Experts(backend), 0
    for bound in launches:
        backend.driver.launch(bound)
        total += weight_bytes(bound, experts.kernel(bound), experts.behind(bound))
    return total
