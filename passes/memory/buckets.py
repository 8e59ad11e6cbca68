"""memory.buckets: the shapes of calls that a GPU engine is made for."""

from __future__ import annotations

from pydantic import Field

from tmlc.errors import PipelineError
from tmlc.ir.program import Method, Program, type_of
from tmlc.ir.types import ITEM_BYTES
from tmlc.pipeline.pass_base import Pass, PassConfig, PassContext, PassResult
from tmlc.pipeline.registry import register_pass

MAX_BATCH = 4096


@register_pass("memory.buckets")
class ChooseBuckets(Pass):
    """Chooses the buckets (sessions × positions) that each method is lowered for: a call runs the smallest that
    holds it, and nothing is compiled while serving.

    `batch` and `positions` list the sizes; a bucket is every pair whose padded positions are at most `rows`, and whose
    inputs and results are at most `megabytes` together. Sizes of positions stop at the most that a method takes
    (`max_n`), which is always one of them where it fits. `(1, 1)` is always there. Calls that no bucket holds are cut
    into several, which changes no bit. Writes `program.meta["buckets"]`: {method: [[batch, positions], ...]}.
    """

    class Config(PassConfig):
        batch: list[int] = Field(default=[1, 2, 4, 8, 16, 32, 64], min_length=1)
        positions: list[int] = Field(default=[1, 4, 16, 64], min_length=1)
        rows: int = Field(default=256, gt=0)
        megabytes: int = Field(default=64, gt=0)

    config: Config

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        for name in ("batch", "positions"):
            sizes = getattr(self.config, name)
            if sizes != sorted(set(sizes)) or sizes[0] != 1 or sizes[-1] > MAX_BATCH:
                raise PipelineError(
                    f"{name} is {sizes}", where="memory.buckets", fix=f"list sizes from 1 to {MAX_BATCH}, each larger"
                )
        chosen = {method.name: self._buckets(method) for method in program.methods.values()}
        program.meta["buckets"] = chosen
        notes = [f"{name}: {', '.join(f'{b}x{n}' for b, n in pairs)}" for name, pairs in chosen.items()]
        return PassResult(program, sum(map(len, chosen.values())), notes=notes)

    def _buckets(self, method: Method) -> list[list[int]]:
        most = method.max_n
        sizes = sorted({n for n in self.config.positions if n < most} | {most if most <= self.config.rows else 1})
        arguments = [type_of(node) for node in (*method.inputs, *method.outputs)]

        def fits(batch: int, n: int) -> bool:
            moved = batch * sum(kind.numel(n) * ITEM_BYTES[kind.dtype] for kind in arguments)
            return (batch, n) == (1, 1) or (batch * n <= self.config.rows and moved <= self.config.megabytes << 20)

        return [[batch, n] for batch in self.config.batch for n in sizes if fits(batch, n)]
