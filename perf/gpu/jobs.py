"""The names of jobs: what one process builds, checks and times.

`small bf16` is an engine, `small bf16+overlap` the same with the pass memory.overlap, `small bf16-fuse.steps` without
the pass fuse.steps (any number of passes may be left out so), and `small pytorch` is PyTorch on the sizes of a preset.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from tmlc.errors import UsageError
from tmlc.pipeline.pipeline import Pipeline, load_pipeline

PEERS = "pytorch"
PASSES = Path(__file__).parents[2] / "docs/passes.md"
FORM = f"PRESET PRECISION[+overlap][-PASS]... (without these passes), or PRESET {PEERS}"
_NAME = re.compile(r"(?P<preset>\S+) (?P<precision>\w+)(?P<overlap>\+overlap)?(?P<without>(-[a-z_.]+)*)")


@dataclass(frozen=True)
class Job:
    """What a name says.

    Attributes:
        preset: of the zoo, or `tiny`.
        precision: of the engine; PEERS for PyTorch.
        overlap: with the pass memory.overlap.
        without: passes that are left out of the Triton pipeline.
    """

    preset: str
    precision: str
    overlap: bool = False
    without: tuple[str, ...] = ()

    @staticmethod
    def parse(name: str) -> Job:
        """Raises UsageError for what names no job. `pipeline` tells whether its passes are there."""
        found = _NAME.fullmatch(name)
        if found is None or (found["precision"] == PEERS and name != f"{found['preset']} {PEERS}"):
            raise UsageError(f"{name!r} names no job", fix=f"write {FORM}")
        return Job(found["preset"], found["precision"], bool(found["overlap"]), tuple(found["without"].split("-")[1:]))

    @property
    def name(self) -> str:
        overlap = "+overlap" if self.overlap else ""
        return f"{self.preset} {'-'.join((self.precision + overlap, *self.without))}"

    @property
    def stem(self) -> str:
        """The name as part of a file's."""
        return self.name.replace(" ", "-")

    @property
    def whole(self) -> Job:
        """The same with every pass."""
        return replace(self, without=())

    @property
    def plain(self) -> Job:
        """The same without overlap."""
        return replace(self, overlap=False)

    def pipeline(self) -> Pipeline:
        """The passes of its engine.

        Raises:
            UsageError: one that is left out is not in the Triton pipeline, or no engine can do without it.
        """
        steps = load_pipeline("triton")
        levels = {step.name: step.level for step in steps.steps}
        for left in self.without:
            if not levels.get(left):
                wrong = "no engine can do without" if left in levels else "the Triton pipeline has no pass"
                may = ", ".join(name for name, level in levels.items() if level)
                raise UsageError(f"{wrong} {left}", where=self.name, fix=f"may be left out: {may}")
        steps = steps.disable(self.without)
        return steps.before("memory.buckets", "memory.overlap") if self.overlap else steps


def exact() -> set[str]:
    """Passes that docs/passes.md calls exact: an engine has the same bits without one of them."""
    return set(re.findall(r"^\| `([\w.]+)` \|(?:[^|]*\|){2} exact", PASSES.read_text("utf-8"), re.MULTILINE))
