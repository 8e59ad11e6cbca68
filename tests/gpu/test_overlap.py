"""Launches that begin before the one before has ended: every kernel waits, the plan is the same but for that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import tmlc
from tmlc.errors import EmitError
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand, Variant
from tmlc.kernels.triton.overlap import DEPENDENTS, WAIT, with_wait
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.variants import compile_variant
from tmlc.package.reader import open_package
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.report.gpu_code import disassembled

FEATURE = "triton.overlap.v1"


@pytest.fixture(scope="module")
def overlapping(tiny, lab, tmp_path_factory) -> Path:
    """The package of the smallest model for sm80 and sm90, with overlapping launches."""
    out = tmp_path_factory.mktemp("overlap") / "o.tmlc"
    steps = load_pipeline("triton").configure("memory.buckets", **lab.buckets)
    steps = steps.before("memory.buckets", "memory.overlap")
    with lab.nothing_compiled():
        tmlc.compile(tiny.checkpoint, out, target="triton:sm80+sm90", precision="bf16", pipeline=steps)
    return out


def test_only_architectures_that_have_it_overlap(overlapping, tiny):
    with open_package(overlapping) as held:
        assert FEATURE in held.manifest.required_features
        for sm, there in ((80, False), (90, True)):
            variants = held.json(f"engines/triton/sm{sm}/code.json")["variants"]
            products = [v for v in variants if "OVERLAP" in v["constexprs"]]
            assert products and all(v["constexprs"]["OVERLAP"] is there for v in products)
    with open_package(tiny.gpu) as held:
        assert FEATURE not in held.manifest.required_features


def test_the_launches_are_those_without_overlap(overlapping, tiny, lab, machine, tmp_path):
    plain = lab.compile(tiny.checkpoint, tmp_path / "plain.tmlc", "bf16", "triton:sm90")
    tokens = [5, 9, 40, 3, 77]
    found = []
    for package in (plain, overlapping):
        with lab.load(package, machine) as engine, engine.session() as session:
            found.append(np.concatenate([session.append(tokens=tokens[:4]), session.append(tokens=tokens[4:])]))
            bucket = engine.backend.plan.methods["decode"].buckets[0]
            begun = {launch.overlap for launch in engine.backend.launches(bucket)}
            # The host device takes the oldest architecture of a package.
            assert begun == {False}
            engine.backend._overlap = True
            assert {launch.overlap for launch in engine.backend.launches(bucket)} == {True}
    assert np.array_equal(*found)


def instructions(variant: Variant) -> list[str]:
    """Its machine code; it must not spill."""
    made = compile_variant(variant)
    assert not made.spill_bytes
    return [line.split("*/")[1].split(";")[0] for line in disassembled(made.cubin).splitlines() if "*/" in line]


def test_machine_code_waits_before_it_reads_anything_that_another_kernel_wrote(overlapping):
    """A product asks for its weights first, and attention for its session's slot and count; all others wait at once,
    among them the experts' second product where the first one chose them. The assembler calls the wait ACQBULK, and
    what lets the next kernel begin PREEXIT."""
    from tmlc.emit.triton.tune import package_samples

    with open_package(overlapping) as held:
        launches = {sample.launch.kernel: sample.launch for _, sample in package_samples(held, 90)}
    for kernel in ("linear_kernel", "moe_gate_up_kernel", "moe_down_sum_kernel", "attention_kernel"):
        before = before_the_wait(launches[kernel].variant(90))
        assert ("CCTL" in " ".join(before)) == (kernel == "linear_kernel")
        loads = sorted(name.split()[0] for name in before if "LDG" in name)
        assert loads == (["LDG.E", "LDG.E.64"] if kernel == "attention_kernel" else [])


def test_experts_that_a_router_chose_ask_for_their_weights_before_they_wait():
    """What chose them had ended when the launch before was let begin."""
    rows = {name: Operand("arena", kind, (1, 0), cols, cols)
            for name, kind, cols in (("x", "f32", 64), ("weights", "f32", 3), ("experts", "i32", 3))}  # fmt: skip
    stacked = {name: Operand("weight", "bf16", (0, 4 * m), 64, 64, name=name, shape=(4, m, 64))
               for name, m in (("gate_up", 128), ("down", 64))}  # fmt: skip
    numbers = dict.fromkeys(("alpha", "limit", "gate_cap", "up_cap"), 0.0) | {"grouped_from": 0}
    for n, kernel in ((1, "moe_down_sum_kernel"), (16, "moe_down_kernel")):
        made = lower(Call("moe", rows | stacked, numbers, (rows["x"],), Bucket(1, n), 90)).launches
        (launch,) = [one for one in made if one.kernel == kernel]
        before = " ".join(before_the_wait(launch.overlapping().variant(90)))
        assert "CCTL" in before and "LDG" in before


def before_the_wait(variant: Variant) -> list[str]:
    """Loads, prefetches and exits before the wait; there is no store, and no program ends."""
    names = instructions(variant)
    wait = next(k for k, name in enumerate(names) if "ACQBULK" in name)
    assert any("PREEXIT" in name for name in names[wait:])
    assert not any("STG" in name or " EXIT" in name for name in names[:wait])
    return [name for name in names[:wait] if "LDG" in name or "CCTL" in name]


def test_programs_that_write_keys_ask_for_their_session_before_they_wait(overlapping):
    """The others, which norm queries, wait at once; either wait lies before what its programs read and write."""
    with open_package(overlapping) as held:
        made = next(v for v in held.json("engines/triton/sm90/code.json")["variants"]
                    if v["kernel"] == "prepare_kv_write_kernel")  # fmt: skip
    constexprs = tuple(sorted(made["constexprs"].items()))
    signature = tuple(made["signature"])
    variant = Variant(made["kernel"], constexprs, signature, made["num_warps"], made["num_stages"], 90, True)
    kinds = ("ACQBULK", "PREEXIT", "LDG.E.64", "LDG", "STG", " EXIT")
    found = [next((kind for kind in kinds if kind in name), "") for name in instructions(variant)]
    found = [kind for kind in found if kind]
    waits = [k for k, kind in enumerate(found) if kind == "ACQBULK"]
    assert all(found[k + 1] == "PREEXIT" for k in waits)
    # What stands before each, from where its programs begin: which kind comes first is the assembler's choice.
    starts = [max((j + 1 for j in range(k) if found[j] == " EXIT"), default=0) for k in waits]
    asked = [found[start:k] for start, k in zip(starts, waits, strict=True)]
    assert sorted(asked) == [[], ["LDG.E.64", "LDG"]]  # nothing; a slot and a count
    assert found[-1] == " EXIT" and found.count("STG") >= 3


def test_a_wait_is_put_before_everything_and_only_once():
    ptx = ".version 8.7\n.visible .entry k(\n\t.param .u64 p\n)\n.reqntid 128\n{\n\t.reg .b32 \t%r<5>;\n\tld.global;\n"
    made = with_wait(ptx).splitlines()
    assert [line.strip() for line in made[6:9]] == [".reg .b32 \t%r<5>;", WAIT, DEPENDENTS]
    assert made[9].strip() == "ld.global;" and with_wait(with_wait(ptx)) == with_wait(ptx)
    with pytest.raises(EmitError, match="entry of a kernel"):
        with_wait(".version 8.7\n")
