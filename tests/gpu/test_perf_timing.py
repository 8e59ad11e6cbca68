"""How engines are timed on a GPU: what a call is made of and must read, full caches, and clocks that leave the host out
or show it. The device here lies in host memory, and its clock is given where a time matters."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from tmlc.kernels.triton.mode import PARAMETERS
from tmlc.kernels.triton.registry import load_kernels
from tmlc.runtimes.core.backend import DTYPES
from tmlc.runtimes.cuda.driver import Address, KernelLaunch


@pytest.fixture(scope="module")
def engine(tiny, lab, machine):
    mark = machine.mark()
    with lab.load(tiny.gpu, machine, 4) as made:
        yield made
    machine.release(mark)


@pytest.fixture
def backend(engine):
    """That of the engine, whose slots are as new again behind the test."""
    yield engine.backend
    for index in range(engine.slots.count):
        engine.slots.memory.zero(index)


# What a call is made of.


def bucket_of(backend, method, batch, n):
    return next(b for b in backend.plan.methods[method].buckets if (b.batch, b.n) == (batch, n))


def arguments(backend, method, bucket):
    """The inputs of a call that is in place, each with its rows flat."""
    found = []
    for spec, at in zip(backend.plan.methods[method].spec.inputs, bucket.inputs, strict=True):
        kind, rows = DTYPES[spec.dtype], bucket.batch * spec.rows(bucket.n)
        found.append(backend.staging[0][at : at + rows * spec.cols * kind.itemsize].view(kind).reshape(rows, spec.cols))
    return found


def test_a_rehearsed_call_has_other_values_in_every_row_and_the_same_for_a_seed(backend):
    for name, method in backend.plan.methods.items():
        bucket, made = bucket_of(backend, name, 4, 1), []
        for seed in (0, 0, 1):
            backend.rehearse(name, bucket, seed)
            made.append([rows.copy() for rows in arguments(backend, name, bucket)])
        for first, again, other, below in zip(*made, method.id_limits, strict=True):
            assert np.array_equal(first, again)
            if first.dtype == np.float32 and first.shape[1] == 1:
                assert (first == np.float32(0.8)).all()
                continue
            assert not np.array_equal(first, other) and len(np.unique(first, axis=0)) == len(first), name
            assert first.min() >= 0 or first.dtype == np.float32
            assert not below or first.max() < below
        counts = backend.staging[0][bucket.counts : bucket.counts + 16].view(np.int32)
        assert (counts == 1).all()


def test_a_chain_is_staged_by_a_run_of_it_for_as_many_sessions_as_it_holds(perf, engine, backend, monkeypatch):
    """By the way that ticks take: different sessions, tokens of the vocabulary, and speech where there is any."""
    asked = []

    def run_chain(key, slots, needs):
        asked.append((key, list(slots), needs))

    monkeypatch.setattr(backend, "run_chain", run_chain)
    chains = [chain for chain in backend.chains.glue if chain.batch <= engine.slots.count]
    for chain in chains:
        perf.timing.stage(engine, chain)
    assert [key for key, _, _ in asked] == [chain.key for chain in chains] and {c.batch for c in chains} == {1, 4}
    for key, slots, needs in asked:
        assert slots == list(range(len(slots))) and key.endswith(f".b{len(slots)}")
        assert all(("speak" in need) == key.startswith("speak") for need in needs)
        assert all(need.get("embed_text", 0) == backend.chains.typed for need in needs if "listen_text" in key)


def test_caches_are_filled_with_rows_that_differ_from_replay_to_replay(perf, engine, backend, monkeypatch):
    appended = []

    def replay(method, bucket):
        assert method == "decode"
        appended.append(arguments(backend, method, bucket)[0].copy())

    monkeypatch.setattr(backend, "replay", replay)
    perf.timing.fill(engine)
    rows = np.concatenate(appended)
    assert sum(map(len, appended)) >= 4 * engine.manifest.context.limit
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("fill", [True, False])
def test_kernels_graphs_and_chains_meet_full_caches(perf, engine, monkeypatch, tmp_path, fill):
    """Each step fills them before anything is timed, where it is to."""
    log = []
    monkeypatch.setattr(perf.timing, "fill", lambda engine: log.append("fill"))
    for name in ("kernels", "graph", "chain"):
        row = {"chain": "", "sessions": 4, "method": "", "bucket": ""}
        monkeypatch.setattr(perf.timing, name, lambda *_, n=name, r=row: log.append(n) or (r if n != "kernels" else []))
    monkeypatch.setattr(perf.timing, "rotation", lambda *_: None)
    effort = perf.timing.Effort(fill=fill)
    subject = perf.steps.Subject(
        perf.jobs.Job.parse("tiny bf16"), perf.steps.Settings(tmp_path, 90, "", effort, 0.0),
        perf.results.Results(tmp_path / "r.json"), contextlib.ExitStack(),
    )  # fmt: skip
    subject._engine = engine
    subject.results.put(subject.name, "bandwidth", {"copy_bytes_per_second": 1.0})
    subject._known["config"] = {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_routed_experts": 6}
    for step, what in (("kernels", "kernels"), ("graphs", "graph"), ("chains", "chain")):
        log.clear()
        subject.run(step)
        assert log.count("fill") == fill and log[fill] == what and (not fill or log[0] == "fill")


# What it must read.


def test_of_experts_the_choice_of_a_row_is_read_at_least_and_of_a_table_next_to_nothing(perf):
    config = {"num_experts_per_tok": 4, "n_shared_experts": 1, "n_routed_experts": 48}
    assert perf.floors.least_share(config) == 5 / 49
    assert [perf.floors.part(name, 0.1) for name in ("moe_down_kernel", "embedding_kernel", "linear_kernel")] == [
        0.1, 0.0, 1.0,
    ]  # fmt: skip


class Chosen:
    """A backend whose device holds the experts of rows; `launch` makes a launch of a kernel over them."""

    def __init__(self, experts, counts):
        load_kernels()
        self.memory = {1: np.array(experts).reshape(-1), 2: np.array(counts, np.int32)}
        self.asked, self.driver, self.plan = [], self, SimpleNamespace(variants=[])

    def launch(self, bound):
        self.asked.append(bound.variant)

    def to_host(self, host, address):
        host[:] = self.memory[address]

    def synchronize(self):
        pass

    def bound(self, kernel, args, fixed):
        """A launch with these arguments by name; the others are absent."""
        kind = {"experts": f"*i{8 * self.memory[1].itemsize}", "counts": "*i32:16"}
        names = [name for name in PARAMETERS[kernel] if name in args]
        constexprs = {name: fixed.get(name) for name in PARAMETERS[kernel] if name not in args}
        self.plan.variants.append(SimpleNamespace(name=f"a {kernel}", kernel=kernel, constexprs=constexprs))
        signature = tuple(kind.get(name, "*bf16" if name == "w" else "i32") for name in names)
        given = tuple(args[name] for name in names)
        return KernelLaunch(None, f"a {kernel}", (1, 1, 1), 32, 0, signature, given, 0)

    @property
    def pointers(self):
        return {name: Address(at, "scratch", self.memory[at].nbytes) for name, at in (("experts", 1), ("counts", 2))}


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_the_experts_of_live_rows_are_counted_once(perf, kind):
    """Two sessions with two rows a position and two choices a row: the second has one position of its two."""
    ids = [[[0, 9], [1, 9], [0, 9], [2, 9]], [[3, 9], [1, 9], [7, 8], [6, 5]]]
    held = Chosen(np.array(ids, kind), [2, 1])
    values = {**held.pointers, "w": Address(3, "weight", 1000), "n": 4, "per": 2}
    launch = held.bound("moe_gate_up_kernel", {**values, "count_e": 10}, {})
    assert perf.floors.Experts(held).behind(launch) == 5 / 10
    assert perf.floors.weights_read(held, [launch]) == 500 and held.asked == [launch.variant]


def test_a_row_a_session_is_live_by_its_count_and_numbers_may_be_compiled_in(perf):
    held = Chosen([[0, 4], [1, 4], [2, 4]], [1, 0, 1])
    launch = held.bound("moe_down_sum_kernel", held.pointers, {"count_e": 6, "TOP_K": 2})
    assert perf.floors.Experts(held).behind(launch) == 3 / 6


def test_kernels_of_sorted_pairs_read_the_experts_that_were_sorted(perf):
    held = Chosen([[0, 4], [1, 4]], [2])
    weight = Address(3, "weight", 800)
    sort = held.bound("moe_sort_kernel", {**held.pointers, "n": 2, "per": 1, "count_e": 8}, {"top_k": 2})
    product, other = held.bound("moe_down_kernel", {"w": weight}, {}), held.bound("linear_kernel", {"w": weight}, {})
    assert perf.floors.weights_read(held, [sort, product, other]) == 300 + 800


@pytest.mark.slow
def test_the_floor_of_a_call_is_that_of_the_experts_that_the_device_chose(perf, backend):
    """A call of four positions, whose pairs are sorted, beside the router's own results."""
    bucket = bucket_of(backend, "decode", 1, 4)
    backend.rehearse("decode", bucket)
    experts, shares = perf.floors.Experts(backend), {}
    for launch in backend.launches(bucket):
        backend.driver.launch(launch)
        shares[experts.kernel(launch)] = experts.behind(launch)
    assert shares["moe_sort_kernel"] == shares["moe_gate_up_kernel"] == shares["moe_down_kernel"]
    assert shares["moe_sort_kernel"] * 7 in (4, 5, 6, 7), "rows that differ choose more than the three of one row"
    whole = sum(perf.floors.weight_bytes(x, experts.kernel(x), 1.0) for x in backend.launches(bucket))
    read = perf.floors.weights_read(backend, backend.launches(bucket))
    assert read < whole or shares["moe_sort_kernel"] == 1


def test_copies_of_weights_outgrow_a_cache_for_a_call_that_reads_the_fewest_experts(perf):
    launch = KernelLaunch(None, "", (1, 1, 1), 32, 0, ("*bf16",), (Address(0, "weight", 10 << 20),), 0)
    effort = perf.timing.Effort(rotated=256 << 20)
    assert perf.timing.Rotation.copies(launch, 1.0, effort) == 26
    assert perf.timing.Rotation.copies(launch, 0.5, effort) == 52
    assert perf.timing.Rotation.copies(launch, 0.0, effort) == 1


# Clocks.


class Clock:
    """A driver whose graph takes `device(k)` seconds in its k-th replay, and the host `host` more to begin one that the
    device waits for. `now` is the host's clock."""

    def __init__(self, device, host):
        self._device, self._host = device, host
        self.now, self.done, self.idle = 0.0, 0, True

    def replay(self, graph=None):
        self.now += self._device(self.done) + (self._host if self.idle else 0.0)
        self.done, self.idle = self.done + 1, False

    def synchronize(self):
        self.idle = True

    def timed(self, work, ahead=None):
        if ahead is not None:
            ahead()
        begun = self.now
        work()
        self.idle = True
        return self.now - begun

    def capture(self, work):
        return "graph"

    def forget(self, graph):
        assert graph == "graph"


def test_what_the_host_takes_to_begin_is_no_time_of_a_kernel(perf):
    device = Clock(lambda k: 64.0, host=9.0)
    assert perf.timing._alone(device, [], perf.timing.Effort(launches=64)) == 1.0
    assert perf.timing.repeated(device, device.replay, 10) == 64.0


@pytest.mark.parametrize("times", [50, 3, 1])
def test_the_hosts_gap_is_no_other_where_a_graph_gets_slower_from_replay_to_replay(perf, monkeypatch, times):
    device = Clock(lambda k: 100 + 0.1 * k, host=7.0)
    monkeypatch.setattr(perf.timing.time, "perf_counter", lambda: device.now)
    seconds, waited = perf.timing.both_clocks(device, device.replay, times)
    assert waited - seconds == pytest.approx(7, abs=1.5), "without taking turns the last are 5 slower than the first"
    assert device.done <= 2 * times + 3 * perf.timing.ROUNDS


def test_pytorch_is_timed_behind_a_replay_that_keeps_its_device_busy(perf, monkeypatch):
    import torch

    log = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 64.0

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "Stream", lambda: None)
    monkeypatch.setattr(cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    for name in ("stream", "graph"):
        monkeypatch.setattr(cuda, name, lambda held: contextlib.nullcontext())
    assert perf.peers._graph([lambda: None], 2) == pytest.approx(1e-3)
    assert log == ["wait", *2 * ["replay", "record", "replay", "record", "wait"]]


# Ticks.


@pytest.mark.slow
def test_ticks_are_counted_in_graphs_and_method_by_method(perf, engine):
    """As many as were asked for, or as the time allows; the engine is left as it was."""
    before, log = engine.driver, engine.backend.driver.log
    graphs = []
    for methods in (False, True):
        begun = log.count("replay")
        found = perf.timing.ticks(engine, 1, methods=methods)
        graphs.append(log.count("replay") - begun)
        assert (found["ticks"], found["asked"], found["by_methods"]) == (1, 1, methods)
        assert found["device_bytes_grown"] == 0 and found["p50_ms"] > 0
    assert graphs[0] <= 3 and 7 <= graphs[1] <= 23
    assert perf.timing.ticks(engine, 100, most_seconds=1e-9)["ticks"] == 1 and engine.driver is before
