"""The CPU as a target: a plan that the kernel library has checked, and weights in packed blocks."""

from tmlc.emit.cpu import CpuEngine, coverage, emit
from tmlc.emit.targets import Coverage, Emitted, Progress, Target
from tmlc.emit.validate import check_plan
from tmlc.errors import TargetError
from tmlc.ir.program import Program
from tmlc.ir.quantize import SCHEMES
from tmlc.ir.weights import TensorSource

PLAN = "engines/cpu/plan.json"
FEATURES = ("cpu.plan.v1", "weights.k16")


class CpuTarget(Target):
    """Plans for the kernel library that comes with tmlc."""

    family = "cpu"

    def __init__(self, name: str) -> None:
        if name != self.family:
            fix = "Use cpu: one package serves every processor."
            raise TargetError(f"target cpu takes no argument, not {name!r}", where="--target", fix=fix)
        super().__init__(name)

    def coverage(self, program: Program) -> list[Coverage]:
        return coverage(program)

    def emit(self, program: Program, source: TensorSource, tell: Progress) -> Emitted:
        tell("emitting the plan", 0, 1)
        engine = emit(program)
        scratch = check_plan(engine)
        tell("emitting the plan", 1, 1)
        return Emitted(
            plan=PLAN,
            layout="k16",
            files={PLAN: engine.plan},
            weights=engine.weights,
            methods=engine.methods,
            states=engine.states,
            slot_bytes=engine.slot_bytes,
            arena_bytes=engine.arena_bytes,
            scratch_bytes=scratch,
            features=(*FEATURES, *_weight_features(engine), *_state_features(engine)),
        )


def _weight_features(engine: CpuEngine) -> list[str]:
    """What a reader must know to use the weights: the codes among them."""
    kinds = {SCHEMES[w.scheme].precision for w in engine.weights if w.scheme}
    return sorted(f"weights.k16.{kind}" for kind in kinds)


def _state_features(engine: CpuEngine) -> list[str]:
    """What a reader must know to keep the states: caches of codes among them."""
    return sorted({"states.kv.int8" for s in engine.states if s.kind.startswith("kv_") and s.dtype == "u8"})


TARGET = CpuTarget
