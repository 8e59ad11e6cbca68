"""Which versions of Triton make code that is to be trusted, by architecture. Imports no Triton."""

from collections.abc import Iterable

from tmlc.errors import TargetError
from tmlc.kernels.triton.architectures import TENSOR_MEMORY
from tmlc.versions import dotted, release

#: The first version whose code for an architecture is to be trusted. 3.6's products in tensor memory lack a barrier
#: between the warp that begins one and the others (its issue 9871: wrong sums, measured on a B200), and a fence.
OLDEST = dict.fromkeys(TENSOR_MEMORY, (3, 7))
#: The first that is not in doubt: with 3.7, whose assembler is CUDA 13.1's, a kernel of others had other bits from run
#: to run on a B200 (PyTorch's issue 181248). No kernel of ours was seen to.
UNDOUBTED = dict.fromkeys(TENSOR_MEMORY, (3, 8))


def check_triton(sm: int, version: str) -> None:
    """Raises TargetError where this version of Triton makes wrong code for an architecture."""
    if sm in refused(version):
        raise TargetError(
            f"Triton {version} makes wrong code for sm{sm}", where="--target",
            fix=f"Compile with another one: {install(sm)}. Where a package runs no Triton is needed.",
        )  # fmt: skip


def refused(version: str) -> list[int]:
    """The architectures for which this version of Triton is refused."""
    return [sm for sm, oldest in OLDEST.items() if release(version) < oldest]


def doubts(architectures: Iterable[int], version: str) -> tuple[str, ...]:
    """What to say of this version of Triton, where it is not refused; nothing where there is nothing."""
    return tuple(
        f"Triton {version} for sm{sm}: a kernel of another program had other bits from run to run on a B200 "
        f"(PyTorch's issue 181248); compile with Triton {dotted(UNDOUBTED[sm])} or newer"
        for sm in architectures
        if sm not in refused(version) and release(version) < UNDOUBTED.get(sm, ())
    )


def install(sm: int) -> str:
    """The command that installs a Triton that is not refused for an architecture."""
    return f"pip install 'triton>={dotted(OLDEST[sm])}'"
