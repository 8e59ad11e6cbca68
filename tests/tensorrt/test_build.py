"""Real engines for architectures that are not here, of three models for three of them; what the builder refuses."""

import numpy as np
import pytest

import tmlc
from tmlc.emit.targets import find_target
from tmlc.emit.tensorrt.library import ARCHITECTURES, build_engine, open_library
from tmlc.emit.tensorrt.network import networks
from tmlc.emit.tensorrt.target import PLAN, profiles_of
from tmlc.errors import EmitError
from tmlc.package.reader import open_package
from tmlc.pipeline.manager import run_pipeline
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.runtimes.tensorrt.plan import read_plan

from ..emit.conftest import Builder

MAGIC = b"vtrt"


@pytest.fixture(scope="module")
def ready(checkpoints):
    """name → (program that the pipeline of the target made, its checkpoint)."""
    known = {}

    def make(name: str):
        if name not in known:
            from tmlc.frontend import load_program
            from tmlc.frontend.checkpoint import open_checkpoint

            source = open_checkpoint(checkpoints[name])
            program = run_pipeline(load_program(source, {}), load_pipeline("tensorrt"), source=source)
            known[name] = program, source
        return known[name]

    return make


CASES = [
    pytest.param(name, architecture, marks=[pytest.mark.slow] * (name == "nano" and architecture != "sm89"))
    for name in ("nano", "inkling", "qwen3_moe")
    for architecture in ("sm80", "sm89", "sm120")
]


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_engines_build_for_architectures_that_are_not_here(ready, name: str, architecture: str) -> None:
    program, source = ready(name)
    told: list[tuple[str, int, int]] = []
    emitted = find_target(f"tensorrt:{architecture}").emit(program, source, lambda *step: told.append(step))
    engines = {name: data for name, data in emitted.files.items() if name != PLAN}
    assert len(engines) == len(program.methods)
    assert all(data.startswith(MAGIC) for data in engines.values())
    plan = read_plan(emitted.files[PLAN], {state.name: state for state in emitted.states})
    assert plan.architecture == architecture and set(plan.methods) == set(program.methods)
    assert all(method.engine in engines for method in plan.methods.values())
    stages = {stage for stage, _, _ in told}
    assert {f"building {method}" for method in program.methods} < stages
    assert all(0 <= done <= total for _, done, total in told)


@pytest.mark.parametrize("architecture", [pytest.param("sm80", marks=pytest.mark.slow), "sm89",
                                          pytest.param("sm120", marks=pytest.mark.slow)])  # fmt: skip
def test_engines_with_caches_of_int8_codes_build(checkpoints, architecture: str) -> None:
    from tmlc.frontend import load_program
    from tmlc.frontend.checkpoint import open_checkpoint

    source = open_checkpoint(checkpoints["qwen3_moe"])
    steps = load_pipeline("tensorrt").configure("state.insert", kv_dtype="int8")
    emitted = find_target(f"tensorrt:{architecture}").emit(
        run_pipeline(load_program(source, {}), steps, source=source), source, lambda *_: None
    )
    assert all(data.startswith(MAGIC) for name, data in emitted.files.items() if name != PLAN)
    plan = read_plan(emitted.files[PLAN], {state.name: state for state in emitted.states})
    held = [b for b in plan.methods["decode"].bindings if b.kind == "state"]
    assert {b.dtype for b in held} == {"i8", "f32"} and not any(b.cache for b in held)
    assert "states.kv.int8" in emitted.features


@pytest.mark.slow
def test_a_package_holds_the_engines_and_what_is_ours_is_the_same_again(checkpoints, tmp_path) -> None:
    """TensorRT's builder writes some tables in an order that changes from one build to the next (seen in decode, and
    once in unembed); all else has the same bytes, and the engines the same sizes."""
    files = []
    for number in range(2):
        path = tmp_path / f"{number}.tmlc"
        tmlc.compile(checkpoints["qwen3_moe"], path, target="tensorrt:sm86")
        with open_package(path) as package:
            files.append(package.manifest.files)
    assert {name: info.bytes for name, info in files[0].items()} == {
        name: info.bytes for name, info in files[1].items()
    }
    differ = {name for name in files[0] if files[0][name] != files[1][name]}
    assert all(name.endswith(".engine") for name in differ)
    with open_package(path) as package:
        members = [name for name in package.manifest.files if name.endswith(".engine")]
        assert len(members) == 4 and all(package.read(name).startswith(MAGIC) for name in members)
        assert package.manifest.targets["tensorrt:sm86"].precision == "fp16"


def test_profiles_join_up_to_the_most_positions() -> None:
    assert profiles_of(1) == [(1, 1, 1)]
    assert profiles_of(24) == [(1, 1, 1), (2, 4, 4), (5, 16, 16), (17, 24, 24)]
    assert profiles_of(64)[-1] == (17, 64, 64)


def test_what_the_builder_refuses_names_the_layers_place_in_the_model(library) -> None:
    b = Builder().method("m")
    b.output(b.op("linear", b.input("x", 24), b.weight("w", 8, 24), None))
    node = next(iter(b.program.methods["m"].calls("linear")))
    node.meta["source"] = "layers.3.up_proj at model.py:7"
    net = networks(library, b.program, b.source)["m"]
    g = net.graph
    g.begin(node.name, f"linear, {node.meta['source']}")
    wrong = g.constant(np.zeros(4, np.int8), "i8")  # TensorRT takes codes before a dequantize layer only
    g.output(g.cast(wrong, "f32"), "wrong")
    with pytest.raises(EmitError, match=r"(?s)TensorRT refuses the network: .*layers.3.up_proj at model.py:7"):
        build_engine(library, net.builder, net.network, net.shapes(), [(1, 1, 1)], "m", g.sources, lambda *_: None)


def test_every_architecture_that_is_offered_has_a_builder() -> None:
    assert [open_library(f"tensorrt:{name}").architecture for name in ARCHITECTURES] == list(ARCHITECTURES)
