"""Passes of other distributions: found by their entry point, part of the cache key, loud when broken."""

import subprocess
import sys

import pytest

GOOD = '''
from tmlc.pipeline.pass_base import Pass, PassConfig, PassResult


class Quiet(Pass):
    """Looks, and rewrites nothing."""

    class Config(PassConfig):
        depth: int = 1

    def run(self, program, ctx):
        return PassResult(program, 0)
'''
LIST = """
import sys
sys.path.insert(0, sys.argv[1])
from tmlc.errors import PipelineError
from tmlc.pipeline.pipeline import Pipeline
try:
    print(Pipeline.parse("- {pass: acme.quiet, config: {depth: 3}}", "p").steps[0].build().config)
except PipelineError as error:
    print("refused:", error)
"""


@pytest.fixture
def acme(tmp_path):
    """Writes an installed distribution `acme-passes` 1.2 and runs a script that sees it."""

    def run(module, point="acme.quiet = acme_passes:Quiet", script=LIST):
        info = tmp_path / "acme_passes-1.2.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[tmlc.passes]\n{point}\n")
        (tmp_path / "acme_passes.py").write_text(module)
        command = [sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_third_party_pass_is_a_pass_like_any_other(acme):
    assert acme(GOOD).strip() == "depth=3"


@pytest.mark.parametrize(
    ("module", "point", "words"),
    [
        ("import nothing_of_the_kind", "acme.quiet = acme_passes:Quiet", "cannot be loaded: ModuleNotFoundError"),
        (GOOD, "acme.quiet = acme_passes:Loud", "AttributeError"),
        ("Quiet = 3", "acme.quiet = acme_passes:Quiet", "no subclass of Pass"),
        (GOOD, "state.insert = acme_passes:Quiet", "two passes are called state.insert"),
        (GOOD.replace("class Quiet", "from tmlc.pipeline.registry import register_pass\n@register_pass('acme.other')\n"
                      "class Quiet"), "acme.quiet = acme_passes:Quiet", "calls itself acme.other"),
    ],
)  # fmt: skip
def test_a_broken_one_is_named_with_its_distribution(acme, module, point, words):
    out = acme(module, point)
    assert out.startswith("refused:") and words in out
    assert "acme-passes, entry point" in out and "uninstall acme-passes" in out


def test_its_version_and_sources_are_in_the_cache_key_and_cost_no_torch(acme):
    script = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from tmlc.cache.key import DigestMemo, _plugin_parts
print(_plugin_parts(DigestMemo(None))["plugin acme.quiet"])
assert "torch" not in sys.modules and "acme_passes" not in sys.modules
"""
    first = acme(GOOD, script=script)
    assert first.startswith("acme-passes 1.2, acme_passes:Quiet, ")
    assert acme(GOOD + "# changed\n", script=script) != first
