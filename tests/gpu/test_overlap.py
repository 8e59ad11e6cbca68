"""Launches that begin before the one before has ended: every kernel waits, the plan is the same but for that."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tmlc
from tmlc.emit.triton.tune import package_samples
from tmlc.errors import EmitError
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Variant
from tmlc.kernels.triton.overlap import finished
from tmlc.kernels.triton.overlap import overlapping as overlapping_text
from tmlc.kernels.triton.variants import compile_variant, ptx_of, variant_key
from tmlc.package.reader import open_package
from tmlc.pipeline.pipeline import Pipeline, load_pipeline
from tmlc.report.gpu_code import disassembled, launches_of
from tmlc.report.gpu_plan import lowered_model

FEATURE = "triton.overlap.v1"


@pytest.fixture(scope="module")
def steps(lab) -> Pipeline:
    """With the buckets of the smallest model."""
    plain = load_pipeline("triton").configure("memory.buckets", **lab.buckets)
    return plain.before("memory.buckets", "memory.overlap")


@pytest.fixture(scope="module")
def overlapping(tiny, lab, steps, tmp_path_factory) -> Path:
    """The package of the smallest model for sm80 and sm90, with overlapping launches."""
    out = tmp_path_factory.mktemp("overlap") / "o.tmlc"
    with lab.nothing_compiled():
        tmlc.compile(tiny.checkpoint, out, target="triton:sm80+sm90", precision="bf16", pipeline=steps)
    return out


@pytest.fixture(scope="module")
def decoding(tiny, steps) -> list[Variant]:
    """The variants that the smallest model decodes one position with on sm90."""
    _, lowered, sm = lowered_model(str(tiny.checkpoint), "triton:sm90", "bf16", steps)
    launches = launches_of(lowered.launches[sm], "decode", Bucket(1, 1))
    return list(dict.fromkeys(launch.variant(sm) for launch in launches))


def test_only_architectures_that_have_it_overlap(overlapping, tiny):
    with open_package(overlapping) as held:
        assert FEATURE in held.manifest.required_features
        for sm, there in ((80, False), (90, True)):
            made = {variant["name"] for variant in held.json(f"engines/triton/sm{sm}/code.json")["variants"]}
            launches = [sample.launch for _, sample in package_samples(held, sm)]
            assert {launch.overlap for launch in launches} == {there}
            assert {variant_key(launch.variant(sm)) for launch in launches} <= made
            assert not {variant_key(replace(launch, overlap=not there).variant(sm)) for launch in launches} & made
    with open_package(tiny.gpu) as held:
        assert FEATURE not in held.manifest.required_features


def test_the_launches_are_those_without_overlap(overlapping, tiny, lab, steps, machine, tmp_path):
    """The interpreter runs them one behind the other; what overlaps runs as PTX in test_ptx.py."""
    plain, only = tmp_path / "plain.tmlc", tmp_path / "only.tmlc"
    lab.compile(tiny.checkpoint, plain, "bf16", "triton:sm90")
    with lab.nothing_compiled():
        tmlc.compile(tiny.checkpoint, only, target="triton:sm90", precision="bf16", pipeline=steps)
    tokens = [5, 9, 40, 3, 77]
    found = []
    # Of several architectures the host device takes the oldest: sm80, whose launches do not overlap.
    for package, overlaps in ((plain, False), (only, True), (overlapping, False)):
        with lab.load(package, machine) as engine, engine.session() as session:
            found.append(np.concatenate([session.append(tokens=tokens[:4]), session.append(tokens=tokens[4:])]))
            bucket = engine.backend.plan.methods["decode"].buckets[0]
            assert {launch.overlap for launch in engine.backend.launches(bucket)} == {overlaps}
    assert np.array_equal(found[0], found[1])


def instructions(variant: Variant) -> list[str]:
    """Its machine code; it must not spill."""
    made = compile_variant(variant)
    assert not made.spill_bytes
    return [line.split("*/")[1].split(";")[0] for line in disassembled(made.cubin).splitlines() if "*/" in line]


#: In machine code: the wait, what lets the next kernel begin, loads and asynchronous copies.
WAITS, BEGINS, LOADS = "ACQBULK", "PREEXIT", ("LDG.", "LDGSTS.")


def kind(line: str) -> str:
    """The instruction of a line of machine code, without what it is guarded by."""
    return re.sub(r"^@!?U?P\w+ ", "", line.strip()).split()[0]


def test_machine_code_waits_before_it_reads_anything_that_another_kernel_wrote(decoding):
    """The assembler moves no load over the wait: as many stand before it as in PTX, which the ticks of test_ptx.py run.
    A product has its weights on the way then; whatever it is, a kernel lets the next one begin first of all."""
    found: dict[str, list[str]] = {}
    for variant in decoding:
        kernel, ptx = variant.kernel, ptx_of(variant).ptx
        names = instructions(variant)
        assert sum(WAITS in name for name in names) == ptx.count("griddepcontrol.wait"), kernel
        wait = next(k for k, name in enumerate(names) if WAITS in name)
        early = names[:wait]
        assert not any("STG" in name or " EXIT" in name for name in early)
        first = next(k for k, name in enumerate(early) if BEGINS in name)
        assert not any(kind(name).startswith(LOADS) for name in early[:first]), kernel
        if ptx.count("griddepcontrol.wait") == 1:
            before = ptx.partition("griddepcontrol.wait")[0]
            loads = [name for name in map(kind, early) if name.startswith(LOADS)]
            assert len(loads) == len(re.findall(r"ld\.global|cp\.async\.c[ag]", before)), kernel
            found.setdefault(kernel, []).extend(loads)
    assert any(name.startswith("LDGSTS") for name in found["linear_kernel"])
    assert {"LDG.E.STRONG.GPU", "LDG.E.64.STRONG.GPU"} <= set(found["attention_kernel"]), "a count and a slot"
    assert all("STRONG.GPU" in name or "LDGSTS" in name for loads in found.values() for name in loads), "from L2"
    for kernel in ("moe_gate_up_kernel", "moe_down_sum_kernel"):  # whose weights are those of experts
        assert found[kernel] and not any(name.startswith("LDGSTS") for name in found[kernel])
    assert len(found) >= 5


def test_programs_that_part_wait_where_they_have_parted(decoding):
    """Those of a router have a row of weights on the way, those that norm wait at once."""
    router = next(variant for variant in decoding if variant.kernel == "router_logits_kernel")
    parts = re.split(r"^\$L\w+:", ptx_of(router).ptx, flags=re.MULTILINE)
    waits = (part.partition("griddepcontrol.wait") for part in parts)
    norming, multiplying = sorted(before.count("ld.global") for before, wait, _ in waits if wait)
    assert norming == 0 < multiplying


FUNCTION = """module {
  tt.func public @k(%out: !tt.ptr<f32> loc("out"), %x: !tt.ptr<f32> loc("x"), %w: !tt.ptr<f32> loc("w")) attributes {} {
    %0 = tt.get_program_id x : i32 loc(#loc)
BODY    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
LOADS_OF = """    %a = tt.addptr %x, %0 : !tt.ptr<f32>, i32 loc(#loc)
    %b = tt.load %a : !tt.ptr<f32> loc(#loc)
    %c = tt.addptr %w, %0 : !tt.ptr<f32>, i32 loc(#loc)
    %d = tt.load %c : !tt.ptr<f32> loc(#loc)
"""
COPIES = """    %y = tt.splat %x : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>> loc(#loc)
    %m = ttg.local_alloc : () -> !ttg.memdesc<4xf32, #shared, #smem, mutable> loc(#loc)
    %e = ttg.async_copy_global_to_local %y, %m : tensor<4x!tt.ptr<f32>> -> <4xf32, #shared, #smem, mutable> loc(#loc)
    %f = ttg.async_commit_group tokens %e loc(#loc)
    %v = tt.splat %w : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>> loc(#loc)
    %n = ttg.local_alloc : () -> !ttg.memdesc<4xf32, #shared, #smem, mutable> loc(#loc)
    %g = ttg.async_copy_global_to_local %v, %n : tensor<4x!tt.ptr<f32>> -> <4xf32, #shared, #smem, mutable> loc(#loc)
    %h = ttg.async_commit_group tokens %g loc(#loc)
    %i = ttg.async_wait %f, %h {num = NUM : i32} loc(#loc)
"""


def order(body: str, unwritten=(2,)) -> list[str]:
    """What a function becomes: the first result of each op, of the wait `wait`, and the names of other ops."""
    made = overlapping_text(FUNCTION.replace("BODY", body), unwritten)
    lines = made[made.index("{} {") : made.index("\n  } loc")].splitlines()[1:]
    held = [re.match(r"\s*(?:%(\w+?) = |(\S+))", line) for line in lines]
    return ["wait" if (one[1] or "").startswith("waited") else one[1] or one[2] for one in held if one]


def test_what_no_kernel_writes_is_asked_for_before_the_wait():
    assert order(LOADS_OF) == ["begun", "0", "a", "c", "d", "wait", "b", "tt.return"]
    assert order(LOADS_OF, ()) == ["begun", "0", "a", "wait", "b", "c", "d", "tt.return"]
    assert order(LOADS_OF, (1, 2)) == ["begun", "0", "a", "b", "c", "d", "wait", "tt.return"]


def test_an_address_that_comes_from_another_kernel_is_waited_for():
    either = LOADS_OF.replace("%b = tt.load %a", "%b = tt.load %s").replace(
        "    %b", "    %s = arith.select %p, %w, %a : !tt.ptr<f32> loc(#loc)\n    %b"
    )
    assert order(either) == ["begun", "0", "a", "s", "c", "d", "wait", "b", "tt.return"], "of one that may be written"
    chosen = LOADS_OF.replace("%w, %0", "%w, %j")
    chosen = chosen.replace("    %c", "    %j = arith.fptosi %b : f32 to i32 loc(#loc)\n    %c")
    assert order(chosen) == ["begun", "0", "a", "wait", "b", "j", "c", "d", "tt.return"]
    behind = "    scf.if %p {\n      tt.store %x, %q : !tt.ptr<f32>\n    } loc(#loc)\n"
    found = order(behind + LOADS_OF)
    assert found == ["begun", "0", "wait", "scf.if", "tt.store", "}", "a", "b", "c", "d", "tt.return"]


def test_groups_of_copies_change_places_only_where_all_are_waited_for():
    """A group that is waited for by how many may follow it keeps its place among them."""
    early = ["v", "n", "g", "h"]
    assert order(COPIES.replace("NUM", "0")) == ["begun", "0", "y", "m", *early, "wait", "e", "f", "i", "tt.return"]
    stay = ["begun", "0", "y", "m", "wait", "e", "f", *early, "i", "tt.return"]
    assert order(COPIES.replace("NUM", "1")) == stay
    kept = order(COPIES.replace("NUM", "1"), (1, 2))
    assert kept == ["begun", "0", "y", "m", "e", "f", *early, "wait", "i", "tt.return"]


def test_nothing_is_copied_to_where_something_else_is_used_before():
    """A second tile into a buffer whose first one is read, and one into a buffer that is written by hand."""
    copies = COPIES.replace("NUM", "0")
    read = "    %j = ttg.local_load %n token %i : !ttg.memdesc<4xf32> -> tensor<4xf32> loc(#loc)\n"
    second = copies[copies.index("    %g") :].replace("%g", "%k").replace("%h", "%l").replace("%i", "%o")
    found = order(copies + read + second)
    assert found.index("g") < found.index("wait") < found.index("j") < found.index("k") < found.index("l")
    store = "    ttg.local_store %b, %n : tensor<4xf32> -> !ttg.memdesc<4xf32> loc(#loc)\n"
    found = order(copies.replace("    %g", store + "    %g"))
    assert found.index("wait") < found.index("ttg.local_store") < found.index("g") < found.index("h")


def test_branches_that_nothing_was_read_before_wait_by_themselves():
    blocks = """    cf.cond_br %p, ^bb1, ^bb2 loc(#loc)
  ^bb1:  // pred: ^bb0
    tt.store %out, %q : !tt.ptr<f32> loc(#loc)
    tt.return loc(#loc)
  ^bb2:  // pred: ^bb0
"""
    found = order(blocks + LOADS_OF)
    one, other = ["^bb1:", "wait", "tt.store", "tt.return"], ["^bb2:", "a", "c", "d", "wait", "b", "tt.return"]
    assert found == ["begun", "0", "cf.cond_br", *one, *other]
    # One that both come to is no place to wait.
    found = order(blocks.replace("^bb1, ^bb2", "^bb1, ^bb1").replace("^bb2", "^bb3") + LOADS_OF)
    assert found[:4] == ["begun", "0", "wait", "cf.cond_br"] and found.count("wait") == 1


def test_loads_before_a_wait_come_from_the_l2_cache():
    """Those of all blocks that are come to without a wait, up to their wait, wherever they stand."""
    wait, load = "griddepcontrol.wait;\n", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];\n"
    cached = load.replace("global", "global.cg")
    parted = f"{load}@%p1 bra $L__BB0_2;\n{load}{wait}{load}$L__BB0_2:\n{load}{wait}{load}$L__BB0_3:\n{load}"
    first, other = f"{cached}@%p1 bra $L__BB0_2;\n{cached}{wait}{load}", f"$L__BB0_2:\n{cached}{wait}{load}"
    assert finished(parted) == f"{first}{other}$L__BB0_3:\n{load}"
    later = f"bra.uni $L__BB0_3;\n$L__BB0_2:\n{load}{wait}{load}$L__BB0_3:\n{load}bra $L__BB0_2;\n"
    assert finished(later) == later.replace(load, cached, 1).replace(f"3:\n{load}", f"3:\n{cached}")
    named = "ld.global.L1::evict_last.b32 { %r1 }, [ %rd1 + 0 ];\n" + cached + wait
    assert finished(named) == named, "what says itself where it comes from"


def test_the_next_kernel_begins_when_this_one_has_its_tensor_memory():
    """Else its programs could hold what these wait for."""
    alloc, begin = "tcgen05.alloc.cta_group::1 [%r1], 64;\n", "griddepcontrol.launch_dependents;\n"
    assert finished(alloc + begin) == alloc + begin
    with pytest.raises(EmitError, match="tensor memory"):
        finished(begin + alloc)


def test_what_is_no_function_of_triton_is_refused():
    with pytest.raises(EmitError, match="not one function"):
        overlapping_text("module {}\n", ())
