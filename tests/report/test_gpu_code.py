"""What `tmlc.report.gpu_code` says of machine code."""

import re

import pytest

pytest.importorskip("triton", reason="the triton extra is not installed")

import tmlc.report.gpu_code as gpu_code
import tmlc.report.gpu_plan as gpu_plan
from tmlc.errors import UsageError
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.variants import compile_variant
from tmlc.pipeline.pipeline import load_pipeline
from tmlc.report.gpu_code import code_of, disassembled, launches_of, read_code

TEXT = """
        .section        .text.kernel
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/                   DEPBAR.LE SB0, 0x0 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/             @!UP1 LDG.E R5, desc[UR4][R2.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/                   STG.E desc[UR4][R2.64], R8 ;
        /*0090*/                   EXIT ;
"""


def test_instructions_are_told_apart():
    total, counts, early, ahead = read_code(TEXT)
    assert (total, early, ahead) == (10, 2, 0)
    assert counts == {"loads": 2, "copies": 1, "stores": 1, "waits": 1, "barriers": 1, "dots": 1, "local": 0}


def test_what_stands_before_a_wait_for_the_launch_before_is_counted_where_programs_part():
    def ahead(*names: str) -> int:
        return read_code("".join(f"        /*0000*/                   {name} ;\n" for name in names))[3]

    assert ahead("LDG.E", "LDGSTS.E", "LDGDEPBAR", "ACQBULK", "LDG.E", "EXIT") == 2
    assert ahead("ACQBULK", "LDG.E", "LDG.E", "EXIT", "LDG.E", "ACQBULK", "LDG.E", "EXIT") == 1
    assert ahead("LDG.E", "EXIT") == 0, "a launch that waits for none"


@pytest.mark.parametrize("sm", [80, 90])
def test_a_product_asks_for_all_that_it_reads_before_its_first_wait(sm):
    x = Operand("arena", "f32", (1, 0), 256, 256)
    weight = Operand("weight", "bf16", (0, 64), 256, 256, name="w", shape=(64, 256))
    out = Operand("arena", "f32", (1, 0), 64, 64, 4096)
    (launch,) = lower(Call("linear", {"x": x, "weight": weight, "bias": None}, {}, (out,), Bucket(1, 1), sm)).launches
    code = code_of(launch.variant(sm))
    assert code.counts["copies"] >= code.early >= code.counts["copies"] // 2 > 0  # the other half stands in the loop
    assert code.counts["dots"] > 0 and code.counts["stores"] > 0
    assert 0 < code.registers <= 255 and code.spill_bytes == code.counts["local"] == 0 < code.shared


@pytest.mark.parametrize("sm", [80, 90])
def test_the_choice_of_a_top_k_router_asks_for_all_that_it_reads_before_its_first_wait(sm):
    """A softmax over 256 experts, which two warps make together, and both biases."""

    def row(cols: int, dtype: str = "f32") -> Operand:
        return Operand("arena", dtype, (1, 0), cols, cols)

    def weight(*shape: int) -> Operand:
        return Operand("weight", "f32", (0, shape[0]), shape[1], shape[1], name="w", shape=shape)

    given = {"x": row(64), "norm": weight(1, 64), "weight": weight(256, 64)}
    given |= {"logit_bias": weight(1, 256), "bias": weight(1, 256)}
    attrs = dict(eps=1e-6, scores=0, top_k=8, normalise=True, groups=1, top_groups=1, scale=1.0, n_shared=0)
    call = Call("norm_topk_router", given, attrs, (row(8), row(8, "i32"), row(64)), Bucket(1, 1), sm)
    code = code_of(lower(call).launches[1].variant(sm))
    assert code.early == code.counts["loads"] > 0 and code.counts["barriers"] > 0


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize(("scores", "bias"), [(0, None), (1, "bias"), (2, "logit_bias")])
def test_experts_that_choose_themselves_ask_for_all_logits_at_once(sm, scores, bias):
    """And for the count of the row, the norm's scale and the bias: before the first exponential or exchange of threads.
    Then no warp waits for another before weights are asked for."""

    def row(cols: int) -> Operand:
        return Operand("arena", "f32", (1, 0), cols, cols)

    def weight(*shape: int, dtype: str = "f32") -> Operand:
        return Operand("weight", dtype, (0, shape[0]), shape[-1], shape[-1], name="w", shape=shape)

    given = {"x": row(512), "norm": weight(1, 512), "weight": weight(128, 512)}
    given |= {"gate_up": weight(128, 512, 512, dtype="bf16"), "down": weight(128, 512, 256, dtype="bf16")}
    given |= {} if bias is None else {bias: weight(1, 128)}
    attrs = dict(eps=1e-6, scores=scores, top_k=8, normalise=scores < 2, groups=1, top_groups=1, scale=1.0, n_shared=0)
    attrs |= dict(alpha=0.0, limit=0.0, gate_cap=0.0, up_cap=0.0, grouped_from=0)
    variant = lower(Call("norm_topk_moe", given, attrs, (row(512),), Bucket(1, 1), sm)).launches[1].variant(sm)
    text = disassembled(compile_variant(variant).cubin)
    asked, made, exchanged, waited = (
        [found.start() for found in re.finditer(pattern, text)]
        for pattern in (r"\bLDG\.", r"\bLDGSTS\.", r"\b(REDUX|SHFL|MUFU)\.", r"\bBAR\.")
    )
    *chosen, row_of_activations = asked  # which is asked for with the weights
    assert len(chosen) == (6 if bias is None else 10) and max(chosen) < exchanged[0] < made[0] < waited[0]
    assert row_of_activations < waited[0]


@pytest.mark.parametrize("module", [gpu_code, gpu_plan])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "cpu"], "target cpu has no kernels for GPUs"),
        (["--target", "triton:sm42"], "unknown architecture 'sm42'"),
        (["--precision", "fp4"], "unknown precision 'fp4'"),
        (["--bogus"], "--bogus"),
    ],
)
def test_wrong_usage_of_the_modules_is_exit_2_with_the_reason(monkeypatch, capsys, module, options, words):
    preset = ["nano", "decode"] if module is gpu_code else ["nano"]
    monkeypatch.setenv("TMLC_CACHE", "off")
    monkeypatch.setattr("sys.argv", ["module", *preset, *options])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_turns_of_shared_memory_stand_behind_the_rest_where_they_are_asked_for(monkeypatch, capsys):
    """Of every product; those of `nano` take no turn too many."""
    monkeypatch.setenv("TMLC_CACHE", "off")
    monkeypatch.setattr("sys.argv", ["module", "nano", "decode", "--kernel", "linear_kernel", "--turns"])
    gpu_code.main()
    head, *rows, last = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[-4:] == ["instructions", "issue", "turns", "least"] and len(rows) > 1
    assert all(0 < int(row[-1]) == int(row[-2]) for row in rows)
    assert int(last[0]) == sum(int(row[1]) * int(row[-3]) for row in rows)


def test_products_that_overlap_have_their_weights_on_the_way_before_they_wait(monkeypatch, capsys):
    monkeypatch.setenv("TMLC_CACHE", "off")
    monkeypatch.setattr("sys.argv", ["module", "nano", "decode", "--kernel", "linear_kernel", "--overlap"])
    gpu_code.main()
    head, *rows, _ = (line.split() for line in capsys.readouterr().out.splitlines())
    ahead = head.index("ahead")
    assert head[ahead + 1] == "early" and all(0 < int(row[ahead]) <= int(row[ahead + 1]) for row in rows)


@pytest.mark.parametrize(
    ("programs", "warps", "turns"),
    [(1, 1, 100), (1, 8, 200), (132, 4, 100), (133, 4, 200), (133, 1, 100), (264, 8, 400)],
)
def test_turns_of_issue_are_of_the_multiprocessor_with_the_most_programs(programs, warps, turns):
    assert gpu_code.issue_of(programs, warps, 100, 132) == turns


@pytest.mark.parametrize(
    ("argument", "words"), [("giant", "neither a preset nor a checkpoint"), ("--disable=nothing", "no pass 'nothing'")]
)
def test_a_plan_of_nothing_that_there_is_is_exit_2_too(monkeypatch, capsys, argument, words):
    monkeypatch.setenv("TMLC_CACHE", "off")
    words_of = ["nano", argument] if argument.startswith("-") else [argument]
    monkeypatch.setattr("sys.argv", ["module", *words_of, "--launches"])
    with pytest.raises(SystemExit) as stop:
        gpu_plan.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_a_call_is_lowered_without_reading_weights():
    """Codes are made of weights, and their report reads every one; a large model's would take hours."""
    steps = gpu_plan.unreading(load_pipeline("triton"), "fp8")
    assert [step.config["report"] for step in steps.steps if step.name == "quantize.fp8"] == [False]
    assert gpu_plan.unreading(steps, "bf16") is steps


@pytest.mark.parametrize(
    ("method", "bucket", "fix"), [("decade", Bucket(1, 1), "decode, speak"), ("decode", Bucket(1, 3), "b1n1, b1n4")]
)
def test_a_call_that_there_is_not_names_those_that_are(method, bucket, fix):
    methods = {"decode": {Bucket(1, 1): [], Bucket(1, 4): []}, "speak": {}}
    assert launches_of(methods, "decode", Bucket(1, 4)) == []
    with pytest.raises(UsageError) as caught:
        launches_of(methods, method, bucket)
    assert caught.value.fix == f"use one of {fix}"
