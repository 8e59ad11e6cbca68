"""The machine that runs PTX: single instructions against the manual, hazards that it must find, and kernels in it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import triton_harness
from triton_harness import Session, Shape, agree, bf16, bits, draw, run, weight, with_compiler_for

from tmlc.errors import EmitError, KernelError
from tmlc.kernels.triton.ptx import host
from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.kernels.triton.ptx.machine import Kernel, run_kernel
from tmlc.kernels.triton.ptx.memory import BASE, CHUNK, Fault, Global
from tmlc.kernels.triton.ptx.text import parse
from tmlc.kernels.triton.registry import lower

HEAD = """.version 8.7
.target sm_90a
.visible .entry k(.param .u64 .ptr .global .align 16 k_param_0, .param .u32 k_param_1)
.reqntid {threads}
{{
\t.reg .pred %p<9>;
\t.reg .b16 %rs<9>;
\t.reg .b32 %r<40>;
\t.reg .b64 %rd<20>;
\tld.param.b64 %rd1, [k_param_0];
\tmov.u32 %r1, %tid.x;
\tmul.wide.u32 %rd2, %r1, 4;
\tadd.s64 %rd3, %rd1, %rd2;
"""


def execute(body: str, given: np.ndarray, threads: int = 32, programs: int = 1, overlap: bool = False, written=()):
    """Runs a kernel over a copy of `given`, whose address is its first parameter; %rd3 is that of a thread's word.
    written: chunks that launches wrote."""
    memory = given.copy().view(np.uint8).reshape(-1)
    chunks = np.isin(np.arange(-(-memory.size // CHUNK)), written)
    held = Global(memory, [(BASE, BASE + memory.size)], chunks)
    execute_over(held, body, threads, programs, overlap)
    return memory.view(given.dtype).reshape(given.shape)


def execute_over(held: Global, body: str, threads: int = 32, programs: int = 1, overlap: bool = False) -> None:
    kernel = Kernel(parse(HEAD.format(threads=threads) + body + "\n\tret;\n}\n"))
    with np.errstate(all="ignore"):
        run_kernel(kernel, (programs, 1, 1), threads, [BASE, 7], held, 1024, overlap)


def computed(operation: str, *operands: int | float) -> int:
    """The word that an instruction makes of words; `d` is the result, `a`, `b`, `c` are the operands."""
    given = np.zeros(32, np.uint32)
    lines = []
    for number, value in enumerate(operands):
        bits = np.float32(value).view(np.uint32) if isinstance(value, float) else np.uint32(value & 0xFFFFFFFF)
        lines.append(f"mov.b32 %r{10 + number}, {int(bits)};")
    names = {"d": "%r20", "a": "%r10", "b": "%r11", "c": "%r12", "da": "%rd10", "p": "%p1", "s": "%rs1"}
    text = re.sub(r"\b(da|[abcdps])\b(?![.\w])", lambda found: names[found[1]], operation)
    return int(execute("\n".join([*lines, text, "st.global.b32 [%rd3], {%r20};"]), given)[0])


def real(word: int) -> float:
    return float(np.uint32(word).view(np.float32))


@pytest.mark.parametrize(
    ("operation", "operands", "wanted"),
    [
        ("add.s32 d, a, b;", (0xFFFFFFFF, 2), 1),
        ("sub.s32 d, a, b;", (1, 2), 0xFFFFFFFF),
        ("add.s16x2 d, a, b;", (0xFFFF0001, 0x00010002), 0x00000003),
        ("mul.hi.u32 d, a, b;", (0x80000000, 6), 3),
        ("mul.hi.s32 d, a, b;", (-2, 1 << 30), 0xFFFFFFFF),
        ("cvt.s64.s32 da, a; mul.hi.s64 da, da, 3074457345618258603; cvt.u32.u64 d, da;", (-600,), 0xFFFFFF9B),
        ("cvt.s64.s32 da, a; mul.hi.u64 da, da, da; cvt.u32.u64 d, da;", (-3,), -6 & 0xFFFFFFFF),
        ("mad.lo.s32 d, a, b, c;", (-3, 5, 20), 5),
        ("mad.wide.s32 %rd10, a, b, 1; cvt.u32.u64 d, %rd10;", (-1, 1), 0),
        ("div.s32 d, a, b;", (-7, 2), -3 & 0xFFFFFFFF),
        ("rem.s32 d, a, b;", (-7, 2), -1 & 0xFFFFFFFF),
        ("shl.b32 d, a, b;", (1, 32), 0),
        ("shr.s32 d, a, b;", (-8, 40), 0xFFFFFFFF),
        ("shr.u32 d, a, b;", (0xF0, 4), 15),
        ("bfe.u32 d, a, 4, 8;", (0x12345,), 0x34),
        ("bfe.s32 d, a, 4, 4;", (0x80 | 0x5,), 0xFFFFFFF8),
        ("prmt.b32 d, a, b, 0x7050;", (0x33221100, 0x77665544), 0x77005500),
        ("prmt.b32 d, a, b, 0x8;", (0x80, 0), 0x808080FF),
        ("popc.b32 d, a;", (0xF0F0,), 8),
        ("lop3.b32 d, a, b, c, 0xea;", (0b1100, 0b1010, 0b0001), 0b1001),  # a & b | c
        ("lop3.b32 d, a, b, c, 0x96;", (0b1100, 0b1010, 0b0110), 0b0000),  # a ^ b ^ c
        ("fma.rn.bf16x2 d, a, b, c;", (0x00400001, 0x7F007F00, 0x80008000), 0x3F803C80),  # subnormal numbers count
        ("fma.rn.bf16x2 d, a, b, c;", (0x3F813F80, 0x3F813F80, 0x3F803B80), 0x40013F80),  # rounded once, ties to even
        ("mov.b32 {s, %rs2}, a; fma.rn.bf16 s, s, %rs2, s; cvt.u32.u16 d, s;", (0x3F804040,), 0x40C0),
        ("mov.b32 {s, %rs2}, a; mul.rn.bf16 s, s, %rs2; cvt.u32.u16 d, s;", (0x3F814040,), 0x4042),
        ("max.s32 d, a, b;", (-1, 1), 1),
        ("min.u32 d, a, b;", (-1, 1), 1),
        ("setp.lt.u32 p, a, b; selp.b32 d, 5, 6, p;", (-1, 1), 6),
        ("setp.neu.f32 p, a, b; selp.b32 d, 5, 6, p;", (float("nan"), 1.0), 5),
        ("setp.ne.f32 p, a, b; selp.b32 d, 5, 6, p;", (float("nan"), 1.0), 6),
        ("setp.nan.f32 p, a, b; selp.b32 d, 5, 6, p;", (float("nan"), 1.0), 5),
        ("cvt.rn.bf16x2.f32 d, a, b;", (1.0, 1.00390625), 0x3F803F80),
        ("cvt.rn.bf16.f32 s, a; cvt.f32.bf16 d, s;", (1.01171875,), 0x3F820000),
        ("cvt.rzi.s32.f32 d, a;", (-2.7,), -2 & 0xFFFFFFFF),
        ("cvt.rzi.s32.f32 d, a;", (3e10,), 0x7FFFFFFF),
        ("mov.b32 {s, %rs2}, a; cvt.u32.u16 d, %rs2;", (0x12345678,), 0x1234),
        ("mov.b64 %rd10, {a, b}; shr.u64 %rd10, %rd10, 28; cvt.u32.u64 d, %rd10;", (0x30000000, 1), 0x13),
        ("mov.b32 d, %r1; shfl.sync.idx.b32 d, d, 9, 31, -1;", (), 9),
        ("mov.b32 d, %r1; shfl.sync.bfly.b32 d, d, 5, 31, -1;", (), 5),
        ("redux.sync.add.s32 d, %r1, -1;", (), 31 * 16),
        ("elect.sync d|p, -1; selp.b32 d, %r1, 100, p; redux.sync.add.s32 d, d, -1;", (), 31 * 100),
        ("{\n.reg .b16 low, high;\nmov.b32 {low, high}, a;\nbra.uni over;\nmov.b32 {high, low}, a;\nover:\n}\n"
         "{\n.reg .b32 low;\nmov.b32 low, a;\nadd.s32 d, low, 1;\n}\n", (6,), 7),
    ],
)  # fmt: skip
def test_an_instruction_does_what_the_manual_says(operation, operands, wanted):
    assert computed(operation, *operands) == wanted


ONE_NUMBER = "mov.b32 d, 0f7FC00000; setp.eq.s32 p, %r1, 7; selp.b32 d, a, d, p;"  # of a warp; the others are NaN


@pytest.mark.parametrize(
    ("operation", "operands", "wanted"),
    [
        ("fma.rn.f32 d, a, b, c;", (1.0 + 2.0**-12, 1.0 + 2.0**-12, -1.0 - 2.0**-11), 2.0**-24),
        ("max.f32 d, a, b;", (float("nan"), -3.0), -3.0),
        ("ex2.approx.ftz.f32 d, a;", (-130.0,), 0.0),
        ("ex2.approx.f32 d, a;", (-1.0,), 0.5),
        ("rsqrt.approx.ftz.f32 d, a;", (16.0,), 0.25),
        ("mul.rn.ftz.f32 d, a, b;", (2.0**-100, 2.0**-40), 0.0),
        ("cvt.rpi.ftz.f32.f32 d, a;", (1.25,), 2.0),
        ("neg.f32 d, a;", (2.0,), -2.0),
        ("max.f32 d, a, b, c;", (float("nan"), -3.0, -2.0), -2.0),
        ("cvt.rn.bf16.f32 s, a; sub.rn.f32.bf16 d, s, b;", (2.0, 0.5), 1.5),
        ("mov.b64 da, {a, b}; mul.rn.f32x2 da, da, da; mov.b64 {d, %r13}, da; sub.rn.f32 d, d, %r13;", (3.0, 2.0), 5.0),
        ("mov.b64 da, {a, b}; fma.rn.f32x2 da, da, da, da; mov.b64 {%r13, d}, da;", (3.0, 2.0), 6.0),
        (f"{ONE_NUMBER} redux.sync.max.f32 d, d, -1;", (-3.0,), -3.0),
        (f"{ONE_NUMBER} redux.sync.max.abs.f32 d, d, -1;", (-3.0,), 3.0),
    ],
)
def test_an_instruction_gives_the_number(operation, operands, wanted):
    assert real(computed(operation, *operands)) == wanted


@pytest.mark.parametrize("way", ["", ".trans"])
def test_a_matrix_is_stored_as_it_lies_in_the_threads_or_transposed(way):
    """Element (i, j) is 8·i + j: thread t has two of row t / 4."""
    body = f"""mul.lo.u32 %r10, %r1, 2;
add.s32 %r11, %r10, 1;
shl.b32 %r11, %r11, 16;
or.b32 %r10, %r10, %r11;
and.b32 %r12, %r1, 7;
shl.b32 %r12, %r12, 4;
stmatrix.sync.aligned.m8n8.x1{way}.shared.b16 [%r12], {{%r10}};
bar.sync 0;
shl.b32 %r13, %r1, 2;
ld.shared.b32 %r20, [%r13];
st.global.b32 [%rd3], {{%r20}};"""
    found = execute(body, np.zeros(32, np.uint32)).view(np.uint16).reshape(8, 8)
    wanted = np.arange(64, dtype=np.uint16).reshape(8, 8)
    assert np.array_equal(found, wanted.T if way else wanted)


def test_threads_that_part_meet_again():
    """Each thread of two programs counts to its own number; a shuffle behind the loop needs whole warps."""
    body = """
	mov.u32 %r2, %ctaid.x;
	mov.b32 %r3, 0;
$L__loop:
	add.s32 %r3, %r3, 1;
	setp.lt.s32 %p1, %r3, %r1;
	@%p1 bra $L__loop;
	shfl.sync.idx.b32 %r4, %r3, 31, 31, -1;
	mul.lo.s32 %r5, %r2, 256;
	cvt.u64.u32 %rd4, %r5;
	add.s64 %rd5, %rd3, %rd4;
	mad.lo.s32 %r6, %r4, 100, %r3;
	st.global.b32 [%rd5], {%r6};"""
    found = execute(body, np.zeros((2, 64), np.uint32), threads=64, programs=2)
    wanted = np.repeat([31, 63], 32) * 100 + np.maximum(np.arange(64), 1)
    assert np.array_equal(found, [wanted, wanted])


SHARED = "mov.b32 %r8, global_smem;\nshl.b32 %r9, %r1, 2;\nadd.s32 %r2, %r8, %r9;\n"
OTHER = "xor.b32 %r3, %r9, 128;\nadd.s32 %r3, %r8, %r3;\n"  # the place of a thread of the other warp
READ = "ld.shared.b32 %r4, [%r3];\nst.global.b32 [%rd3], {%r4};"
GOOD = f"{SHARED}{OTHER}st.shared.b32 [%r2], %r1;\nbar.sync 0;\n{READ}"


def test_warps_exchange_numbers_over_a_barrier():
    assert np.array_equal(execute(GOOD, np.zeros(64, np.uint32), threads=64), np.arange(64) ^ 32)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (GOOD.replace("bar.sync 0;\n", ""), "another warp wrote, with no barrier"),
        (f"{SHARED}{OTHER}ld.shared.b32 %r4, [%r3];\nst.shared.b32 [%r2], %r1;", "another warp read, with no barrier"),
        (f"{SHARED}st.shared.b32 [%r8], %r1;", "two threads write different numbers"),
        (f"{SHARED}ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r2];", "unaligned"),
        (f"{SHARED}ld.shared.b32 %r4, [%r2+1024];", "of 1024"),
        ("st.global.b32 [%rd3+4], {%r1};", "outside of the operands"),
        ("ld.global.v2.b32 {%r4, %r5}, [%rd3];", "unaligned"),
        ("setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L__a;\nbar.sync 0;\nbra.uni $L__b;\n$L__a:\nbar.sync 0;\n$L__b:\n"
         "mov.b32 %r2, 0;", "different barriers"),
        ("setp.lt.s32 %p1, %r1, 3;\n@%p1 shfl.sync.idx.b32 %r4, %r1, 0, 31, -1;", "not all threads of a warp"),
    ],
)  # fmt: skip
def test_a_hazard_is_found(body, fault):
    with pytest.raises(Fault, match=fault):
        execute(body, np.zeros(64, np.uint32), threads=64)


def test_a_gpu_has_one_nan_so_two_threads_that_write_one_agree():
    """As a row of nobody gives where its scratch held no numbers: NumPy keeps the bits of either operand."""
    body = f"{SHARED}or.b32 %r4, %r1, 0x7FC00000;\nadd.f32 %r5, %r4, 0f3F800000;\nst.shared.b32 [%r8], %r5;\n"
    found = execute(f"{body}bar.sync 0;\nld.shared.b32 %r6, [%r8];\nst.global.b32 [%rd3], {{%r6}};", np.zeros(32, "u4"))
    assert np.isnan(found.view(np.float32)).all()


COPY = f"{SHARED}cp.async.ca.shared.global [%r2], [%rd3], 4, %r20;\ncp.async.commit_group;\n"
TAKE = "ld.shared.b32 %r4, [%r2];\nadd.s32 %r4, %r4, 1;\nst.global.b32 [%rd3], {%r4};"


def test_a_copy_is_there_when_it_was_waited_for_and_zero_where_it_reads_nothing():
    words = np.arange(32, dtype=np.uint32) + 5
    size = "setp.lt.s32 %p1, %r1, 16;\nselp.b32 %r20, 4, 0, %p1;\n"
    found = execute(f"{size}{COPY}cp.async.wait_group 0;\n{TAKE}", words)
    assert np.array_equal(found, np.where(np.arange(32) < 16, words, 0) + 1)


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;\n"])
def test_a_copy_that_nobody_waited_for_is_found(wait):
    with pytest.raises(Fault, match="something is on its way"):
        execute(f"mov.b32 %r20, 4;\n{COPY}{wait}{TAKE}", np.zeros(32, np.uint32))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ld.global.cg.b32 %r4, [%rd3];\ngriddepcontrol.wait;", "reads what a launch wrote"),
        ("ld.global.b32 %r4, [%rd3];\ngriddepcontrol.wait;", "reads what its multiprocessor may have kept"),
        ("st.global.b32 [%rd3], {%r1};\ngriddepcontrol.wait;", "writes, and has not waited"),
        ("griddepcontrol.launch_dependents;", "ends, and has not waited"),
        ("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nld.global.b32 %r4, [%rd3];\n"
         "st.global.b32 [%rd3], {%r4};", ""),
    ],
)  # fmt: skip
def test_a_launch_that_overlaps_waits_before_it_reads_what_another_wrote(body, fault):
    words = np.arange(96, dtype=np.uint32)  # two chunks, of which threads read the first
    if fault:
        with pytest.raises(Fault, match=fault):
            execute(body, words, overlap=True, written=[0])
    else:
        assert np.array_equal(execute(body, words, overlap=True, written=[0]), words)
    if "launch wrote" in fault:  # what no launch wrote is there
        execute(body, words, overlap=True, written=[1])
        memory = words.copy().view(np.uint8)
        held = Global(memory, [(BASE, BASE + memory.size)], np.zeros(-(-memory.size // CHUNK), np.bool_))
        execute_over(held, "griddepcontrol.wait;\nst.global.b32 [%rd3], {%r1};", overlap=True)
        with pytest.raises(Fault, match=fault):  # that a launch has written some is remembered
            execute_over(held, body, overlap=True)


@pytest.mark.parametrize(
    "line",
    ["sin.approx.f32 %r4, %r1;", "fma.rn.relu.bf16x2 %r4, %r1, %r1, %r1;", "mul.rn.bf16x2 %r4, %r1, %r1;",
     "add.sat.f32 %r4, %r1, %r1;", "max.xorsign.abs.f32 %r4, %r1, %r1;",
     "redux.sync.xor.b32 %r4, %r1, -1;", "tcgen05.shift.cta_group::1.down [%r4];",
     "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r4], 32;"],
)  # fmt: skip
def test_an_instruction_that_is_not_known_is_refused(line):
    with pytest.raises(EmitError, match="not run here: " + re.escape(line.split()[0])) as caught:
        execute(line, np.zeros(32, np.uint32))
    assert caught.value.where.endswith(f": {line.strip(';')}")
    assert caught.value.fix.endswith("tests/kernels_triton/test_ptx.py")


@pytest.mark.parametrize(
    ("body", "what"),
    [("mov.b32 %r4, %clock;", "operand"), ("mov.b32 5, %r4;", "result"), ("mov.b32 %r4, <5>;", "operand"),
     ("ld.global.b32 %r4, [5];", "address"), ("5 %r4;", "statement"),
     ("setp.lt.s32 %p1, %r1, 5;\n@%p1 bar.sync 0;", "barrier for some threads")],
)  # fmt: skip
def test_what_is_not_known_of_an_instruction_is_refused(body, what):
    with pytest.raises(EmitError, match=f"^PTX {what} that is not run here: ") as caught:
        execute(body, np.zeros(32, np.uint32))
    assert caught.value.fix.startswith("teach it in kernels/triton/ptx/")


def test_a_text_without_a_kernel_is_refused():
    with pytest.raises(EmitError, match="without a kernel") as caught:
        parse(".version 8.7\n")
    assert "`variants.ptx_of`" in caught.value.fix


TENSOR = """
	mov.b32 %r8, global_smem;
	setp.lt.s32 %p1, %r1, 32;
	@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r8], 32;
	bar.sync 0;
	ld.shared.b32 %r9, [%r8];
	shr.u32 %r2, %r1, 5;
	shl.b32 %r2, %r2, 21;
	add.s32 %r9, %r9, %r2;
	tcgen05.st.sync.aligned.{}.x2.b32 [%r9 + 1], {{%r1, %r2}};
	tcgen05.wait::st.sync.aligned;
	tcgen05.ld.sync.aligned.{}.x1.b32 {{%r4}}, [%r9 + 1]{};
	tcgen05.wait::ld.sync.aligned;
	bar.sync 0;
	@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r9, 32;
	st.global.b32 [%rd3], {{%r4}};"""
WHOLE = TENSOR.format("32x32b", "32x32b", "")


@pytest.mark.parametrize("shape", ["32x32b", "16x32bx2"])
def test_words_of_tensor_memory_lie_where_the_manual_says(shape):
    """Two columns of 32 lanes are stored by each warp. Of the split shape the upper threads of a warp read the lanes of
    the lower ones, here one column further, where the number of the warp's first lane is."""
    found = execute(TENSOR.format("32x32b", shape, "" if shape == "32x32b" else ", 1"), np.zeros(64, np.uint32), 64)
    upper = (np.arange(64) % 32 >= 16) & (shape != "32x32b")
    assert np.array_equal(found, np.where(upper, np.arange(64) // 32 << 21, np.arange(64)))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (WHOLE.replace("tcgen05.wait::st.sync.aligned;", ""), "reads tensor memory that something is on its way to"),
        (re.sub(r"@%p1 tcgen05.dealloc[^;]*;", "", WHOLE), "a program ends and keeps tensor memory"),
        (WHOLE.replace("[%r9 + 1], {", "[%r9 + 31], {"), "columns of tensor memory that the program does not have"),
        (WHOLE.replace("shl.b32 %r2, %r2, 21;", "shl.b32 %r2, %r2, 22;"), "lanes of tensor memory that are of another"),
        (WHOLE.replace("tcgen05.wait::ld.sync.aligned;", "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r9 + 1], {%r1};"),
         "writes tensor memory that is still being read"),
    ],
)  # fmt: skip
def test_a_hazard_of_tensor_memory_is_found(body, fault):
    with pytest.raises(Fault, match=fault):
        execute(body, np.zeros(64, np.uint32), threads=64)


ARRIVES_BEHIND = """
	mov.b32 %r8, global_smem;
	setp.lt.s32 %p1, %r1, 32;
	setp.eq.s32 %p2, %r1, 0;
	@%p2 mbarrier.init.shared::cta.b64 [%r8], 1;
	bar.sync 0;
	@%p1 bra $L__BB0_2;
$L__BB0_1:
	mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r8], 0;
	@!%p3 bra.uni $L__BB0_1;
	st.global.b32 [%rd3], {%r1};
	bra.uni $L__BB0_3;
$L__BB0_2:
	@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r8];
	bra.uni $L__BB0_1;
$L__BB0_3:
	bar.sync 0;"""


def test_who_waits_for_a_product_is_overtaken_by_who_begins_it():
    """What begins it may stand behind the wait, and be of another warp."""
    assert np.array_equal(execute(ARRIVES_BEHIND, np.zeros(64, np.uint32), threads=64), np.arange(64))
    with pytest.raises(Fault, match=r"waits for the end of a product that nobody has begun .*try_wait"):
        execute(re.sub(r"@%p2 tcgen05[^;]*;", "", ARRIVES_BEHIND), np.zeros(64, np.uint32), threads=64)
    with pytest.raises(Fault, match="no barrier between"):  # whoever waits must know that it is a barrier already
        execute(ARRIVES_BEHIND.replace("bar.sync 0;", "", 1), np.zeros(64, np.uint32), threads=64)


@pytest.fixture(scope="module")
def ptx():
    with PtxMachine(90) as opened:
        yield opened


def test_products_in_tiles_of_8_and_of_16_rows_have_the_same_bits(ptx):
    """Their columns are of one instruction, and the order of the instructions is the same."""
    sessions = [Session({"x": draw(i, count, 300)}, count=count) for i, count in enumerate((3, 1, 17))]
    weights = {"weight": weight(draw(9, 33, 300), "bf16")}
    agree(ptx, "linear", sessions, {}, [Shape("f32", 33)], 2e-6, weights, cuts=(1, 9), activations={"x": bf16})


def test_overlapping_launches_ask_for_what_no_kernel_writes_before_they_wait(ptx, monkeypatch):
    """A product, a router and experts: weights are asked for, then waited, then the same bits as ever."""
    monkeypatch.setattr(triton_harness, "lower", lambda call: overlapping(lower(call)))
    given = [Session({"x": draw(0, 3, 128)}, count=3)]
    shared = {"norm": weight(1 + 0.3 * draw(7, 1, 128)), "weight": weight(draw(8, 11, 128))}
    routed = {"bias": weight(draw(2, 1, 10)), "scale": weight(np.array([[1.3]], np.float32))}
    attrs = {"eps": 1e-5, "top_k": 3, "n_shared": 1, "route_scale": 2.5}
    results = [Shape("f32", 4), Shape("i64", 4), Shape("f32", 128)]
    agree(ptx, "norm_router", given, attrs, results, 1e-5, shared | routed, cuts=(1,))
    agree(ptx, "linear", given, {}, [Shape("f32", 11)], 2e-6, {"weight": weight(draw(8, 11, 128), "bf16")},
          cuts=(1,), activations={"x": bf16})  # fmt: skip
    attrs = {"eps": 1e-5, "scores": 1, "top_k": 4, "normalise": True, "groups": 1, "top_groups": 1, "scale": 1.0,
             "n_shared": 0}  # fmt: skip
    biases = {name: weight(draw(i, 1, 11)) for i, name in enumerate(("logit_bias", "bias"))}
    agree(ptx, "norm_topk_router", given, attrs, results, 1e-5, shared | biases, cuts=(1,))
    found = run(ptx, "linear", given, {}, [Shape("f32", 11)], {"weight": weight(draw(8, 11, 128), "bf16")})
    monkeypatch.undo()
    plain = run(ptx, "linear", given, {}, [Shape("f32", 11)], {"weight": weight(draw(8, 11, 128), "bf16")})
    assert np.array_equal(bits(found[0][0]), bits(plain[0][0]))
    asked: dict[str, set[tuple[int, int]]] = {}
    for variant, (_, assembly) in ptx._kernels.items():
        if variant.early is not None:
            asked.setdefault(variant.kernel, set()).update(before_the_waits(assembly.ptx))
    assert asked["linear_kernel"] == {(0, 4)}, "weights are on their way, of one row and of several"
    assert asked["router_logits_kernel"] == {(0, 0), (2, 0)}, "a row of weights and the norm's; who norms waits"
    assert asked["sink_router_kernel"] == {(2, 0)}, "the bias, and the scale"
    assert asked["topk_router_kernel"] == {(2, 0)}, "two biases"


def before_the_waits(ptx: str) -> list[tuple[int, int]]:
    """Loads and asynchronous copies that stand before each wait, behind the label before it."""
    parts = [part.partition("griddepcontrol.wait") for part in re.split(r"^\$L\w+:", ptx, flags=re.MULTILINE)]
    return [(before.count("ld.global"), len(re.findall("cp.async.c[ag]", before))) for before, wait, _ in parts if wait]


def overlapping(lowered):
    return replace(lowered, launches=tuple(launch.overlapping() for launch in lowered.launches))


def mutated(monkeypatch, pattern: str, kernel: str, sm: int = 90, count: int = 1):
    """A machine whose `kernel` lacks the first `count` instructions of a pattern (0: all of them)."""
    made = host.ptx_of

    def without(variant):
        assembly = made(variant)
        if variant.kernel != kernel:
            return assembly
        text, found = re.subn(pattern, "", assembly.ptx, count=count)
        assert found
        return type(assembly)(text, assembly.num_warps, assembly.shared)

    monkeypatch.setattr(host, "ptx_of", without)
    return PtxMachine(sm)


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [(r"bar\.sync\s+0;", "no barrier between"), (r"cp\.async\.wait_group[^;]*;", "something is on its way")],
)
def test_a_product_without_its_first_barrier_or_wait_is_found(monkeypatch, pattern, fault):
    sessions = [Session({"x": draw(0, 2, 300)}, count=2)]
    weights = {"weight": weight(draw(9, 16, 300), "bf16")}
    with mutated(monkeypatch, pattern, "linear_kernel") as machine, pytest.raises(KernelError, match=fault) as caught:
        run(machine, "linear", sessions, {}, [Shape("f32", 16)], weights)
    assert "“Checks without a GPU”" in caught.value.fix


TRY_WAIT = r"\{\s*\.reg \.pred complete;.*?\}\s"


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        (r"(?s)" + TRY_WAIT, "reads tensor memory that something is on its way to"),
        (r"(?m)^.*tcgen05\.commit[^;]*;", "waits for the end of a product that nobody has begun"),
        (r"(?m)^.*tcgen05\.dealloc[^;]*;", "keeps tensor memory"),
        (r"fence\.proxy\.async[^;]*;", "written without a fence"),
    ],
)
def test_attention_in_tensor_memory_without_what_orders_it_is_found(monkeypatch, pattern, fault):
    """Products of Blackwell: of a whole kernel, all of what orders them (some versions of Triton fence twice)."""
    with_compiler_for(100)
    d, k_cache, position = 16, np.zeros((64, 16), np.uint16), np.array([[3]], np.int64)
    states = {"position": position, "k_cache": k_cache, "v_cache": k_cache.copy()}
    one = Session({name: draw(1, 2, 4 * d if name == "q" else d) for name in ("q", "k", "v")}, states, 2)
    attrs = dict(num_heads=4, num_kv_heads=1, scale=0.3, window=0, sinks=0, log_floor=0.0, log_alpha=0.0, softcap=0.0)
    with mutated(monkeypatch, pattern, "attention_kernel", 100, 0) as machine, pytest.raises(KernelError, match=fault):
        run(machine, "attention_state", [one], attrs, [Shape("f32", 4 * d)], {})
