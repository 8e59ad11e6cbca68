"""What docs/passes.md calls exact changes no bit of an engine's output on the CPU."""

import numpy as np
import pytest

import tmlc
import tmlc.compiler as compiler
from tmlc.model_zoo.interaction import create_checkpoint
from tmlc.pipeline.pipeline import load_pipeline

OPTIONAL = ["canonicalize.dead_code", *(s.name for s in load_pipeline("cpu").steps if s.level)]


def test_leaving_out_an_exact_pass_leaves_every_bit(tmp_path, monkeypatch):
    create_checkpoint("nano", 0, tmp_path / "nano")
    traced = tmlc.program(tmp_path / "nano")
    monkeypatch.setattr(compiler, "load_program", lambda source, overrides: traced.clone())

    def answers(pipeline):
        compiler.compile(tmp_path / "nano", tmp_path / "x.tmlc", pipeline=pipeline)
        audio = np.random.default_rng(0).standard_normal(3200).astype(np.float32) * 0.1
        with tmlc.load(tmp_path / "x.tmlc", threads=1, sessions=1) as engine:
            session = engine.session(seed=0)
            parts = [session.append(tokens=[1, 2, 3, 250, 7]), session.append(audio=audio), session.append(tokens=[9])]
            ticks = [session.tick(tmlc.TickInput(audio=audio, text="hello")) for _ in range(3)]
            session.close()
        spoken = [np.concatenate([np.float32(out.tokens), out.audio.ravel()]) for out in ticks]
        return np.concatenate([part.ravel() for part in (*parts, *spoken)])

    whole = answers(load_pipeline("cpu"))
    differ = [name for name in OPTIONAL if not np.array_equal(whole, answers(load_pipeline("cpu").disable([name])))]
    assert differ == []


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_optional_pass_of_the_cpu_pipeline_is_called_exact(name):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs/passes.md").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
    assert line.split(" | ")[3] == "exact"
