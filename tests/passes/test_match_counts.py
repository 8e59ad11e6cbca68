"""How often each pass of the CPU pipeline matches, of each family, at each preset: exactly what match_counts.yaml says.

A number that changes means that a pass (or the frontend, whose record is `canonicalize.foreign`) works differently, or
that transformers writes a model in another way. Look at the programs before changing the table: `tmlc inspect --diff`.
"""

import importlib.util
from pathlib import Path

import pytest
import transformers
import yaml

import tmlc
import tmlc.compiler as compiler
from tmlc.emit.targets import find_target
from tmlc.frontend.foreign import families
from tmlc.pipeline.pipeline import LEVELS, load_pipeline

FOLDER = Path(__file__).parent
TABLE = yaml.safe_load((FOLDER / "match_counts.yaml").read_text("utf-8"))
#: Column → (preset, precision).
COLUMNS = {"O0": ("O0", "fp32"), "O1": ("O1", "fp32"), "O2": ("O2", "fp32"), "int8": ("O2", "int8"),
           "int4": ("O2", "int4")}  # fmt: skip
INKLING = ["inkling_text", "inkling_mm", "inkling2_text", "inkling2_loop_text"]
FAMILIES = [*families(), *INKLING, "interaction"]
#: What transformers must have.
NEEDED = {"inkling2_text": "Inkling2ForCausalLM", "inkling2_loop_text": "Inkling2LoopForCausalLM"}


@pytest.fixture(scope="module")
def write_checkpoint():
    spec = importlib.util.spec_from_file_location("match_models", FOLDER / "match_models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models.write_checkpoint


def counts(report):
    """Pass → matches; a pass that comes again has its place in the row behind its name."""
    found = {}
    for record in report.passes:
        times = sum(name.partition(" ")[0] == record.name for name in found)
        found[f"{record.name} {times + 1}" if times else record.name] = record.matches
    return found


def as_table(found):
    """What match_counts.yaml says of a family: a line a pass, `~` where a preset leaves it out."""
    order = dict.fromkeys(name for column in ("int8", "int4", *LEVELS) for name in found[column])
    places = {name: at for column in found.values() for at, name in enumerate(column)}
    return {name: [found[column].get(name) for column in COLUMNS] for name in sorted(order, key=places.__getitem__)}


def differences(found, said):
    """A sentence for each number that is not the table's, the pass first."""
    for name in dict.fromkeys((*said, *found)):
        pairs = zip(COLUMNS, found.get(name, [None] * 5), said.get(name, [None] * 5), strict=True)
        for column, count, expected in pairs:
            if count != expected:
                ran = "did not run" if count is None else f"matched {count} times"
                table = "is not in the table" if expected is None else f"the table says {expected}"
                yield f"{name} at {column} {ran}, {table}"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pass_matches_as_often_as_the_table_says(family, write_checkpoint, tmp_path, monkeypatch):
    if (needed := NEEDED.get(family)) and not hasattr(transformers, needed):
        pytest.skip(f"needs {needed} of a later transformers")
    folder = write_checkpoint(family, tmp_path / family)
    traced = tmlc.program(folder)
    monkeypatch.setattr(compiler, "load_program", lambda source, bounds: traced.clone())
    last = load_pipeline("cpu").steps[-1].name
    found = as_table({
        column: counts(compiler.compile(folder, tmp_path / "x", preset=preset, precision=precision, stop_after=last))
        for column, (preset, precision) in COLUMNS.items()
    })  # fmt: skip
    wrong = list(differences(found, TABLE.get(family, {})))
    lines = "\n".join(
        f"  {name}: [{', '.join('~' if n is None else str(n) for n in row)}]" for name, row in found.items()
    )
    assert not wrong, f"{family}:\n" + "\n".join(wrong) + f"\nas it is now:\n{family}:\n{lines}\n"


def test_the_table_has_every_family_every_pass_and_the_preset_that_a_plain_compile_runs():
    assert list(TABLE) == FAMILIES
    assert load_pipeline("O2").steps == load_pipeline("cpu").steps
    held = find_target("cpu").precisions
    coders = {name for name, kind in compiler.QUANTISERS.items() if kind in held}
    passes = {step.name for step in load_pipeline("cpu").steps} | coders
    for rows in TABLE.values():
        assert {name.partition(" ")[0] for name in rows} - {"canonicalize.foreign"} == passes


def test_a_number_that_is_not_the_table_s_is_told_with_its_pass():
    found = {"route.a": [1, 2, 2, 2, 2], "fuse.b": [None, 4, 3, 4, 4], "fuse.c": [0] * 5}
    said = {"route.a": [1, 2, 2, 2, 2], "fuse.b": [None, 4, 4, 4, 4], "fuse.d": [None, None, 1, 1, 1]}
    assert list(differences(found, said))[:2] == [
        "fuse.b at O2 matched 3 times, the table says 4",
        "fuse.d at O2 did not run, the table says 1",
    ]
    assert "fuse.c at O0 matched 0 times, is not in the table" in list(differences(found, said))
