"""How tiles of [slices, rows, inputs] lie in shared memory, which Triton decides and this decides again.

Triton derives the order of the axes from how threads copy a tile. Where lanes and warps of a copy cover all rows of one
slice, it takes the slices for the next axis behind the inputs, and staggers its chunks of 16 bytes by slice. Then the
same chunk of all rows of a slice lies in the same banks, and a tensor core's read of 8 rows takes 8 turns. Staggered by
rows each takes one (`PtxMachine(sm, conflicts=Conflicts())` counts them).
"""

import re

_LAYOUT = re.compile(
    r"^(?P<name>#shared\d*) = #ttg\.swizzled_shared<\{vec = (?!1,)\d+, perPhase = \d+, maxPhase = \d+, "
    r"order = \[(?P<order>[012], [012], [012])\]",
    re.MULTILINE,
)
#: Axes from the one whose numbers are next to each other to the slices, by the operand of a product that a tile is.
_ORDERS = {"0": "2, 1, 0", "1": "1, 2, 0"}


def by_rows(text: str) -> str:
    """A module of Triton's GPU dialect whose tiles [slices, rows, inputs] and [slices, inputs, rows] have inputs next
    to each other, then rows, then slices. Whoever copies a tile and whoever reads it name the same layout, so nothing
    else changes. A layout that both operands of products have stays as it is."""

    def ordered(found: re.Match[str]) -> str:
        read = rf", {found['name']}, #smem(?:, mutable)?> -> tensor<[^,]*, #ttg\.dot_op<\{{opIdx = (\d)"
        operands = set(re.findall(read, text))
        order = _ORDERS[operands.pop()] if len(operands) == 1 else found["order"]
        return found[0].replace(f"[{found['order']}]", f"[{order}]")

    return _LAYOUT.sub(ordered, text)
