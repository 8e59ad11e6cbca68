"""Compiling needs memory for the largest output tensor and not for the model, and an interrupt leaves nothing."""

import os
import signal
import subprocess
import sys

import pytest

from tmlc.package import open_package
from tmlc.report.compile_memory import create_wide_checkpoint, measure_compile

GB = 10**9


def test_weights_that_are_cast_and_cast_back_need_no_wide_copy():
    """A bfloat16 checkpoint traced as a float32 model and packed in bfloat16: the float32 form must never exist."""
    import torch

    from tmlc.ir.weights import WeightMap

    weights = WeightMap()
    weights.source("a.bf16", "bf16", (4, 8))
    weights.cast("a", "a.bf16", "f32")
    weights.concat("both", ["a", "a"])
    weights.cast("both.bf16", "both", "bf16")
    made, empty = [], torch.empty

    def counted(*args, **kwargs):
        made.append(kwargs["dtype"])
        return empty(*args, **kwargs)

    value = torch.randn(4, 8).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        out = weights.evaluate("both.bf16", {"a.bf16": value})
    assert made == [torch.bfloat16] and out.equal(torch.cat([value, value]))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """8 GB in five shards: made once, and as large as the disk must have room for twice."""
    folder = tmp_path_factory.mktemp("wide")
    yield create_wide_checkpoint(folder / "wide", 8 * GB)
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.mark.slow
def test_eight_gigabytes_compile_within_one_and_a_half(wide, tmp_path):
    measured = measure_compile(wide, tmp_path / "wide.tmlc", "bf16")
    assert measured["above_bytes"] <= 1.5 * GB, measured
    assert (tmp_path / "wide.tmlc").stat().st_size > 7.5 * GB
    with open_package(tmp_path / "wide.tmlc") as package:
        assert package.manifest.model.name == "wide"
    (tmp_path / "wide.tmlc").unlink()


@pytest.mark.slow
def test_an_interrupt_in_the_middle_leaves_nothing_in_the_folder_or_the_cache(wide, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    command = [sys.executable, "-m", "tmlc.cli.main", "compile", str(wide), "-o", str(out / "x.tmlc")]
    environment = {**os.environ, "TMLC_CACHE": str(cache)}
    process = subprocess.Popen([*command, "--precision", "bf16"], stderr=subprocess.PIPE, text=True, env=environment)
    while "packing weights" not in process.stderr.readline():
        assert process.poll() is None
    parts = list(out.iterdir())
    while not parts or parts[0].stat().st_size < GB // 2:  # a good part of the weights is on the disk
        parts = list(out.iterdir())
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert list(out.iterdir()) == []
    assert not (cache / "packages").exists()
