"""The variants of the kernel library compute the same: bit for bit when portable bits are asked for, else closely."""

from itertools import chain

import kernel_cases
import numpy as np
import pytest
import replay

from tmlc.errors import UsageError
from tmlc.kernels.cpu import Plan, available_isas, load_library

# The largest difference between two variants without portable bits, relative to the largest value of an output. What
# does not depend on quantised activations differs by how often a sum is rounded.
TOLERANCE = 1e-5
# What is rounded inside an operation can round the other way where a last bit differs: weights of bf16 caches to 8 bits
# (and AVX512_BF16 sums in a way of its own), those of int8 caches to 15, hidden values of experts to
# bf16 or 7 bits. Measured over 12 draws of sizes: 1.1e-3, 4.2e-5 and 6.7e-4.
CACHE_TOLERANCE = {"f32": TOLERANCE, "bf16": 4e-3, "int8": 2e-4}
CODES_TOLERANCE = 4e-3


def tolerance(op, case):
    if op == "attention":
        return CACHE_TOLERANCE[case.chosen["dtype"]]
    return CODES_TOLERANCE if op == "moe" and case.chosen["down"] != "f32" else TOLERANCE


def some(best, rng, op):
    sweep = kernel_cases.sweep(best.Builder, rng, op, 23)
    return list(chain(sweep, kernel_cases.mixed(best.Builder, rng, op, 6)))


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_portable_bits_are_those_of_every_variant(best, rng, op):
    libraries = [load_library(isa, portable_bits=True) for isa in available_isas()]
    for case in some(best, rng, op):
        want, *others = (case.run(library, portable_bits=True) for library in libraries)
        for library, got in zip(libraries[1:], others, strict=True):
            for a, b in zip(want, got, strict=True):
                assert a.tobytes() == b.tobytes(), f"{library.isa}: {case.name}"


@pytest.mark.parametrize("op", [op for op in kernel_cases.OPS if "sample" not in op])  # ids may turn over
def test_variants_differ_by_rounding_only(best, rng, op):
    libraries = [load_library(isa) for isa in available_isas()]
    for case in some(best, rng, op):
        want, *others = (case.run(library)[:-1] for library in libraries)
        for library, got in zip(libraries[1:], others, strict=True):
            for a, b in zip(want, got, strict=True):
                if a.dtype == np.float32:
                    assert np.abs(a - b).max() <= tolerance(op, case) * np.abs(a).max(), f"{library.isa}: {case.name}"


def test_no_kernel_depends_on_the_c_library(best, rng, tmp_path):
    """glibc has variants of its functions by processor, whose last bits differ: whichever it takes, nothing changes."""
    program = replay.compile_replay(tmp_path, replay.host_compiler())
    path = best.library.path
    old = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4,-AVX2,-AVX2_Usable,-FMA_Usable,-AVX512F"}
    targets = [
        replay.Target(name, [program], path, portable=True, output=tmp_path / name, env=env)
        for name, env in (("all", {}), ("old", old))
    ]
    cases = [case for op in kernel_cases.OPS for case in kernel_cases.mixed(best.Builder, rng, op, 3)]
    replay.replay(targets, cases, best.library)
    assert (tmp_path / "all").read_bytes() == (tmp_path / "old").read_bytes()


def test_a_library_without_fused_multiply_add_does_not_promise_portable_bits(rng, best):
    library = load_library("portable")
    if library.fused:
        pytest.skip("needs x86: the portable variant of other machines has a fused multiply-add")
    case = kernel_cases.make_case(best.Builder, rng, "add")
    with pytest.raises(UsageError, match="portable_bits"):
        case.run(library, portable_bits=True)
    twin = load_library("portable", portable_bits=True)
    assert twin.isa == "portable" and twin.fused and twin.path != library.path
    assert isinstance(Plan(twin, case.b.words(twin), case.b.weight_array(), 1, portable_bits=True), Plan)


def test_the_emulated_multiply_add_rounds_once(best):
    """linear with the weights (1, b) over the inputs (c, a) is fma(a, b, c), for every a, c against every b."""
    libraries = [load_library(isa, portable_bits=True) for isa in available_isas()]
    if len(libraries) < 2:
        pytest.skip("needs an x86 with AVX2 and FMA")
    f, rng, count = np.float32, np.random.default_rng(4), 400
    special = [
        (1 + 2.0**-12, 1 + 2.0**-12, -1),  # the product has more than 24 bits
        (2.0**-50, 2.0**-50, 1 + 2.0**-23),
        (1 + 2.0**-23, 1 + 2.0**-23, 2.0**-24),
        (1.5 * 2.0**-24, 1 + 2.0**-23, 1),  # a tie by a hair, which a double does not see
        (2.0**-75, -(2.0**-75), 2.0**-126),  # the result is subnormal
        (2.0**-63, 2.0**-64, 2.0**-149),
        (0, 5, -0.0),
    ]
    values = (rng.standard_normal((count, 3)) * 2.0 ** rng.integers(-70, 20, (count, 3))).astype(f)
    values[: len(special)] = np.array(special, f)
    short = values.view(np.uint32)[count // 2 :]
    short &= np.uint32(0xFFFFF000)  # few bits: ties are common
    a, b, c = values.T
    weights = best.pack(np.stack([np.ones(count, f), b], 1), "f32")
    results = []
    for library in libraries:
        plan = best.Builder(max_n=count)
        x, y, w = plan.input(0, "f32", 2), plan.output(0, "f32", count), plan.weight(weights)
        plan.method([x], [y], [("linear", [y, x, w])])
        out = np.zeros((count, count), f)
        made = Plan(library, plan.words(library), plan.weight_array(), 1, portable_bits=True)
        made.run(None, 0, count, np.zeros(0, np.uint8), [np.ascontiguousarray(np.stack([c, a], 1))], [out])
        results.append(out)
    assert all(out.tobytes() == results[0].tobytes() for out in results)
    through_double = (a[:, None].astype(float) * b.astype(float) + c[:, None].astype(float)).astype(f)
    assert (through_double != results[0]).any(), "no case is hard enough to tell"
