"""What the checks of the media and random kernels accept runs inside its operands, under ASan and UBSan."""

import subprocess
from pathlib import Path

import pytest

OPS = {"bag_embedding", "dmel", "patchify", "overlap_add", "philox_normal", "sample"}


@pytest.fixture(scope="module")
def fuzzer(sanitized) -> Path:
    kernels = [s for s in sanitized.sources if s.name in ("media.cpp", "random.cpp")]
    return sanitized.program("check_fuzz", [*kernels, Path(__file__).with_name("check_fuzz.cpp")])


def test_no_accepted_call_leaves_its_operands(fuzzer: Path) -> None:
    result = subprocess.run([str(fuzzer), "1500"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {line[0] for line in lines} == OPS
    for name, _, refused, _, ran, _, refused_valid in lines:
        assert int(ran) > 300, name  # the fuzz reached the kernel …
        assert int(refused) > 300, name  # … and the checks
        assert int(refused_valid) == 0, name
