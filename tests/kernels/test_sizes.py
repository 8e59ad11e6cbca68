"""No kernel reads or writes outside its operands, at any size from 1 to 257 in any dimension.

Every operand lies behind a guard of its own (kernels/cpu/fuzz/plan_replay.cpp): in a build with AddressSanitizer, and,
since a sanitizer does not see masked loads and assembly, in the libraries that are shipped with a page that cannot be
touched behind each operand. The fast tests take every 16th size, the slow one all of them.
"""

import subprocess
from itertools import chain

import kernel_cases
import numpy as np
import pytest
import replay

from tmlc.kernels.cpu import available_isas, load_library

STEP, DRAWN = 16, 12


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return replay.compile_replay(tmp_path_factory.mktemp("replay"), replay.host_compiler())


@pytest.fixture(scope="module")
def sanitized_target(sanitized):
    program = sanitized.program("plan_replay", [replay.SOURCE])
    return replay.Target("sanitized", [program], sanitized.library(), guard="heap", threads=2)


@pytest.fixture(scope="module")
def shipped(program):
    return [replay.Target(isa, [program], load_library(isa).path, threads=2) for isa in available_isas()]


def test_every_operation_has_cases(best):
    assert set(kernel_cases.OPS) == set(best.library.ops)


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_sizes_stay_inside_their_operands(sanitized_target, shipped, best, rng, op):
    cases = chain(
        kernel_cases.sweep(best.Builder, rng, op, STEP),
        kernel_cases.mixed(best.Builder, rng, op, DRAWN),
    )
    assert replay.replay([sanitized_target, *shipped], cases, best.library) > DRAWN


@pytest.mark.slow
@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_all_sizes_stay_inside_their_operands(sanitized_target, shipped, best, rng, op):
    cases = chain(
        kernel_cases.sweep(best.Builder, rng, op),
        kernel_cases.sweep(best.Builder, rng, op, turn=7),
        kernel_cases.mixed(best.Builder, rng, op, 150),
    )
    assert replay.replay([sanitized_target, *shipped], cases, best.library) > 150


@pytest.mark.parametrize("operand", ["input", "output", "weight", "slot"])
@pytest.mark.parametrize("guard", ["heap", "pages"])
def test_one_byte_too_many_is_seen(program, sanitized, best, rng, tmp_path, operand, guard):
    library, flags = tmp_path / "overreader.so", ["-O1", "-fPIC", "-shared"]
    if guard == "heap":
        program = sanitized.program("plan_replay", [replay.SOURCE])
        flags.append("-fsanitize=address")
    source = replay.SOURCE.parents[3] / "tests/kernels/overreader.cpp"
    subprocess.run([replay.host_compiler(), *flags, str(source), "-o", str(library)], check=True)
    case = kernel_cases.make_case(best.Builder, rng, "short_conv", c=20)
    target = replay.Target("overreader", [program], library, guard)
    with pytest.raises(AssertionError, match="overreader: exit code"):
        replay.replay([_with(target, operand)], [case], best.library)
    assert replay.replay([_with(target, "none")], [case], best.library) == 1


def _with(target, operand):
    return replay.Target(target.name, target.program, target.library, target.guard, env={"TMLC_OVERREAD": operand})


@pytest.mark.parametrize("op", kernel_cases.OPS)
def test_every_output_is_written(best, rng, op):
    """Outputs begin as bytes of ones, which is NaN; the inputs hold none."""
    for case in kernel_cases.sweep(best.Builder, rng, op, 31):
        for array in case.run(best.library)[:-1]:
            if array.dtype == np.float32:
                assert not np.isnan(array).any(), case.name
            elif array.dtype == np.int32 and op != "copy":
                assert (array >= 0).all(), case.name
