"""The documents about passes: every pass has its line, and the example is a pass and a test that work."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tmlc.pipeline.registry import all_passes

ROOT = Path(__file__).parents[2]
TARGETS = {"all", "cpu", "triton", "tensorrt", "onnx"}


def table():
    """name → the cells of its line in docs/passes.md."""
    lines = (ROOT / "docs/passes.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0].strip("` "): row[1:] for row in rows}


def built_in():
    return [name for name, cls in all_passes().items() if cls.__module__ == f"tmlc.passes.{name}"]


@pytest.mark.parametrize("name", built_in())
def test_every_pass_has_its_line(name):
    rewrites, buys, exact, targets = table()[name]
    assert rewrites and buys and exact.split(" ")[0] in ("exact", "tolerance", "-"), name
    assert {target.strip() for target in targets.split(",")} <= TARGETS, name


def test_every_line_has_its_pass():
    assert set(table()) == set(built_in())


def listings():
    text = (ROOT / "docs/write-a-pass.md").read_text("utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_example_in_write_a_pass_works_and_is_short(tmp_path):
    code, test = listings()
    assert len(code.splitlines()) + len(test.splitlines()) < 100
    (tmp_path / "scales.py").write_text(code)
    head = (Path(__file__).parent / "conftest.py").read_text("utf-8")
    (tmp_path / "conftest.py").write_text(head + "\nimport importlib.util\n\n"
        f"spec = importlib.util.spec_from_file_location('tmlc.passes.fuse.scales', {str(tmp_path / 'scales.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n")  # fmt: skip
    (tmp_path / "test_scales.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_the_example_keeps_the_rules_of_the_house():
    code, _ = listings()
    tree = ast.parse(code)
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert ast.get_docstring(tree) and ast.get_docstring(cls)
    assert max(map(len, code.splitlines())) <= 120
