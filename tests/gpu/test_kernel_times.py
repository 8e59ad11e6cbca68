"""Times of single launches: on a device in host memory, and what the driver is asked for. Nothing here ran on a GPU."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tmlc.cli.main import cli
from tmlc.runtimes.cuda.nvidia import NvidiaDriver

from .test_nvidia import Bindings


@pytest.mark.slow
def test_launches_are_timed_between_start_and_stop_and_change_no_bit(tiny, lab, machine):
    held = machine.mark()
    with lab.load(tiny.gpu, machine, 2) as gpu:
        with gpu.session(seed=4) as session:
            want = [session.append(tokens=tokens).copy() for tokens in ([1, 2, 3], [4])]
        timer = gpu.backend.kernel_timer()
        with gpu.session(seed=4) as session:
            timer.start()
            assert not gpu.backend.chains.ready, "a tick would not run the graphs that are timed"
            assert np.array_equal(session.append(tokens=[1, 2, 3]), want[0])
            assert timer.stop(disturbed=False)
            assert np.array_equal(session.append(tokens=[4]), want[1])  # nobody times this
        assert not gpu.backend._marked and gpu.backend._note is None and gpu.backend.chains.ready
        calls, plan = timer.calls(disturbed=False), gpu.backend.plan
    machine.release(held)
    assert {call.method for call in calls} == {"embed_text", "decode", "unembed"}
    assert all(call.ns > 0 and call.runs >= 1 and call.rows == 3 and call.nbytes for call in calls)
    places = [(call.method, call.index) for call in calls]
    assert len(set(places)) == len(places)
    count = sum(len(bucket.launches) for bucket in plan.methods["decode"].buckets)
    assert max(index for method, index in places if method == "decode") < count
    assert {call.op for call in calls} <= {variant.kernel for variant in plan.variants}


def test_a_mark_in_a_graph_is_a_node_of_it_and_holds_a_time():
    bindings = Bindings()
    driver = NvidiaDriver(bindings)
    marks = []
    driver.capture(lambda: marks.append(driver.mark()))
    marks.append(driver.mark())
    kinds = [entry[3] for entry in bindings.log if entry[0] == "cuEventRecordWithFlags"]
    assert kinds == [1, 0]  # external: only a capture may ask for it
    assert driver.elapsed(*marks) == pytest.approx(2.5e-3)
    driver.close()
    assert bindings.names().count("cuEventDestroy") == 4  # and the two that every driver has


@pytest.mark.slow
@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="needs a machine without an NVIDIA driver")
def test_a_machine_that_cannot_run_the_target_says_so_plainly(tiny):
    done = CliRunner().invoke(cli, ["profile", str(tiny.gpu), "--seconds", "2"])
    assert done.exit_code == 2 and "driver" in done.stderr and "Traceback" not in done.stderr
