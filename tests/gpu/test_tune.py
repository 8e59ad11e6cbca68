"""`tmlc tune`: which candidates there are, which are left out, the fastest, and the table that comes of it. The GPU
is a device in host memory that runs each launch once, and says the time that a test gave it."""

import contextlib
import hashlib
import itertools
import json
import math

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import tmlc.cli.tune as cli_tune
import tmlc.emit.triton.tune as tune
import tmlc.emit.triton.tune_timer as tune_timer
import tmlc.kernels.triton.tuning as tuning
from tmlc.cache import DigestMemo, compile_key
from tmlc.cli.main import cli
from tmlc.emit.targets import find_target
from tmlc.emit.triton.host_device import HostDevice, Kernel
from tmlc.errors import CapacityError, EmitError, PackageError, TargetError, UsageError
from tmlc.kernels.triton.architectures import ARCHITECTURES
from tmlc.kernels.triton.bucket import Bucket
from tmlc.kernels.triton.launch import Operand
from tmlc.kernels.triton.layouts import FORMS
from tmlc.kernels.triton.registry import Call, lower
from tmlc.kernels.triton.tuning import FORM, Blocks, Shape, Tiles, rule, slices, table
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.package.reader import open_package
from tmlc.runtimes.cuda.driver import DeviceInfo


def faked(spills=(), heavy=()):
    """In place of `build_variants`: machine code that is the variant's name; some spill, some want much memory."""

    def build(variants, on_done=lambda done, total: None, jobs=None, failed=None):
        made = {}
        for v in variants:
            shared = 240000 if v.num_stages in heavy else 1000
            made[v] = Compiled(
                variant_key(v).encode(), v.kernel, v.num_warps, shared, 40, 8 * (v.num_stages in spills), 2
            )
            KERNELS[hashlib.sha256(made[v].cubin).hexdigest()] = Kernel(
                v.kernel, v.constexprs, v.num_warps, v.num_stages
            )
        return made

    return build


KERNELS: dict[str, Kernel] = {}


class Stopwatch(HostDevice):
    """A device whose times are given: `seconds(kernel)` for one launch; each kernel is interpreted once."""

    def __init__(self, machine, seconds, sm=90, nbytes=1 << 32):
        super().__init__(machine, KERNELS, DeviceInfo("a stopwatch", sm, 99000), nbytes)
        self.seconds, self.forgotten, self.loaded, self.positions = seconds, 0, None, set()

    def to_device(self, address, host):
        if host.dtype == np.int64 and host.shape == (1,):
            self.positions.add(int(host[0]))
        super().to_device(address, host)

    def load(self, cubin, entry, shared):
        self.loaded = super().load(cubin, entry, shared)
        return self.loaded

    def timed(self, work, ahead=None):
        assert ahead is not None, "the device would wait for the host"
        return self.seconds(self.loaded) * tune_timer.LAUNCHES

    def replay(self, graph):
        self._ask("replay")
        graph[0]()

    def forget(self, graph):
        assert len(graph) == tune_timer.LAUNCHES
        self.forgotten += 1
        super().forget(graph)


@pytest.fixture
def few(monkeypatch):
    """Little memory is rotated through, and candidates differ in stages only (the interpreter is slow)."""
    monkeypatch.setattr(tune_timer, "ROTATED", 1 << 12)
    monkeypatch.setattr(tune, "build_variants", faked(spills=(4,)))
    every = tune.candidates

    def some(shape, tiles):
        return [b for b in every(shape, tiles) if b.block_m == rule(shape).block_m and 1 < b.stages < 5][:4]

    monkeypatch.setattr(tune, "candidates", some)


@contextlib.contextmanager
def released(machine):
    mark = machine.mark()
    yield machine
    machine.release(mark)


@pytest.fixture(scope="module")
def samples(tiny):
    with open_package(tiny.gpu) as held:
        return tune.package_samples(held, 90)


def test_a_packages_launches_are_those_that_a_table_has_a_say_in(samples):
    found = {shape.op for shape, _ in samples}
    assert found == {"linear", "moe_gate_up", "moe_down", "attention"}
    assert {sample.bucket for _, sample in samples} == {(1, 1), (1, 4), (1, 8)}
    for shape, sample in samples:
        assert tune.with_blocks(sample.launch, shape, table().blocks(shape)) == sample.launch, shape.name


def test_a_package_of_other_kernels_is_refused(tiny, monkeypatch):
    monkeypatch.setitem(tune_timer.PARAMETERS, "linear_kernel", ("another", "list"))
    with open_package(tiny.gpu) as held, pytest.raises(PackageError, match="not those of this version of tmlc"):
        tune.package_samples(held, 90)


def linear_call(tiles, dtype="i8g32"):
    x, out = (Operand(space, "f32", (1, 0), width, width, 0, "0") for space, width in (("input", 96), ("output", 200)))
    weight = Operand("weight", dtype, (0, 200), 96, 96, 0, "w", (200, 96))
    return Call("linear", {"x": x, "weight": weight, "bias": None}, {}, (out,), Bucket(1, 4), 90, tiles)


def attention_call(tiles):
    x = Operand("input", "f32", (1, 0), 64, 64, 0, "0")
    cache, at = Operand("state", "bf16", (0, 96), 64, 64, 64), Operand("state", "i64", (0, 1), 1, 1, 0)
    attrs = dict(num_heads=2, num_kv_heads=2, scale=0.1, window=0, sinks=0, log_floor=0.0, log_alpha=0.0, softcap=0.0)
    return Call("attention_state", {"q": x, "k": x, "v": x, "position": at, "k_cache": cache, "v_cache": cache}, attrs,
                (Operand("output", "f32", (1, 0), 64, 64, 0, "0"),), Bucket(1, 4), 90, tiles)  # fmt: skip


@pytest.mark.parametrize("make", [linear_call, attention_call])
def test_an_entry_of_the_table_gives_the_launch_that_was_measured(make):
    plain = lower(make(table())).launches
    launch = next(one for one in plain if one.kernel in tune.KERNELS)
    shape = tune.shape_of(launch, 90)
    for blocks in tune.candidates(shape, table()):
        made = lower(make(table().with_measured([(shape, blocks)]))).launches
        assert next(one for one in made if one.kernel in tune.KERNELS) == tune.with_blocks(launch, shape, blocks)


def test_candidates_never_change_the_order_of_sums():
    for dtype in ("f32", "bf16"):
        shape = Shape("linear", dtype, 90, 4096, 4096)
        assert {b.block_k for b in tune.candidates(shape, table())} == {rule(shape).block_k}
    for op, dtype in (("attention", "bf16"), ("attention", "u8")):
        shape = Shape(op, dtype, 100, 128, 128)
        assert {b.block_k for b in tune.candidates(shape, table())} == {rule(shape).block_k}
    for dtype, size in (("i4g64", 64), ("i8g32", 32), ("f8g128", 128)):  # a slice is a group, and a warp has whole ones
        shape = Shape("linear", dtype, 90, 4096, 4096)
        assert {(b.block_k, b.warps) for b in tune.candidates(shape, table())} == {(size, 8)}
    first = Blocks(128, 32, 8, 5)
    shape = Shape("moe_down", "i8g32", 90, 64, 32)
    held = tune.candidates(
        shape, Tiles([{"op": "moe_down", "block_m": 128, "block_k": 32, "warps": 8, "stages": 5}], "x")
    )
    assert held[0] == first and held[1] == rule(shape) and len(held) == len(set(held))


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_rule_asks_for_a_row_at_once_and_the_weight_decides_the_order_of_sums(sm):
    """Of `small` on an H200 every product of one row is over in one turn, but that of the dense layer's `down`."""
    for dtype, op, (m, k) in itertools.product(
        ("bf16", "f8g128", "i8g32", "i4g32", "i4g64"), ("linear", "moe_gate_up", "moe_down"),
        ((64, 192), (512, 1024), (1024, 2816), (2048, 4096), (4096, 4096), (201024, 4096)),
    ):  # fmt: skip
        made = rule(Shape(op, dtype, sm, m, k))
        assert made.block_k == rule(Shape(op, dtype, 90, m, k)).block_k == (FORMS[dtype].group or 128)
        count = slices(dtype, k, made.block_k, sm)
        turns = math.ceil(k / (count * made.block_k))
        assert count == tuning.MOST_SLICES or count * made.block_k >= min(k, ARCHITECTURES[sm].reach)
        assert made.warps == min(8, count) and count <= tuning.MOST_SLICES
        assert (made.stages == 3) <= (turns > 1), "there is nothing for a second turn to wait for"
        # The tile's weights and 16 rows of activations, for each turn that is on the way.
        rows = made.block_m * (2 if op == "moe_gate_up" else 1)
        turn = count * made.block_k * (rows * {"bf16": 2}.get(dtype, 1) + 4 * 16)
        assert (made.stages - 1) * turn <= ARCHITECTURES[sm].shared_bytes, (op, dtype, m, k, made)
    if sm == 90:
        assert rule(Shape("linear", "bf16", 90, 1024, 1024)) == Blocks(16, 128, 8, 2)
        assert rule(Shape("linear", "bf16", 90, 1024, 2816)) == Blocks(16, 128, 8, 3)
        assert rule(Shape("linear", "bf16", 90, 16384, 1024)) == Blocks(32, 128, 8, 2)


def test_the_fastest_is_chosen_and_what_spills_is_never_timed(samples, machine, few):
    """Four stages would be the fastest, and spill; three are faster than two."""
    timed = []

    def seconds(kernel):
        timed.append(kernel.num_stages)
        return 1e-6 / kernel.num_stages

    with released(machine):
        device = Stopwatch(machine, seconds)
        tuned, compiled = tune.build_candidates(samples, table(), ["linear"], lambda *_: None)
        tuned = [next(one for one in tuned if one.shape.op == "linear")]
        tune.measure(tuned, compiled, device, lambda *_: None)
    (one,) = tuned
    assert one.chosen.stages == 3 and {c.blocks.stages for c in one.candidates} == {2, 3, 4}
    assert set(timed) == {2, 3} and device.forgotten == len(timed) // tune_timer.REPEATS
    assert {c.refused for c in one.candidates if c.blocks.stages == 4} == {"spills 8 bytes"}
    assert all(c.relative is None and not c.seconds for c in one.candidates if c.refused)


def test_grouped_experts_and_attention_run_on_operands_as_in_a_call(samples, machine, few):
    """The interpreter refuses launches that leave their operands."""
    with released(machine):
        device = Stopwatch(machine, lambda kernel: 1e-6)
        tuned, compiled = tune.build_candidates(
            samples, table(), ["moe_gate_up", "moe_down", "attention"], lambda *_: None
        )
        for one in tuned:
            one.candidates = one.candidates[:1]
        tune.measure(tuned, compiled, device, lambda *_: None)
        assert all(one.chosen == table().blocks(one.shape) for one in tuned)
        assert {s.before is None for one in tuned for s in one.samples} == {True, False}
    counts = {s.bucket[1] for one in tuned if one.shape.op == "attention" for s in one.samples}
    assert len(counts) == 2, "one position, and the most of a tick"
    assert device.positions == {rows - n for rows in (16, 64) for n in counts}, "full: rings of 16 rows, 64 of the rest"


def test_a_tie_keeps_what_there_is():
    def held(*relative):
        made = [tune.Candidate(Blocks(16, 128, 4, n + 2), seconds=[r]) for n, r in enumerate(relative)]
        return tune._fastest(made)

    assert held(1.0, 0.995).stages == 2 and held(1.0, 0.98, 0.5).stages == 4
    assert tune._fastest([tune.Candidate(Blocks(16, 16, 4, 2), refused="spills")]) is None


def test_too_much_shared_memory_is_left_out(samples, monkeypatch):
    monkeypatch.setattr(tune, "build_variants", faked(heavy=(3,)))
    tuned, _ = tune.build_candidates(samples, table(), ["linear"], lambda *_: None)
    for one in tuned:
        for c in one.candidates:
            wanted = "needs 240000 bytes of shared memory, there are 232448" if c.blocks.stages == 3 else ""
            assert c.refused == wanted


def test_another_device_and_too_little_memory_are_clear_errors(samples, machine, few):
    tuned, compiled = tune.build_candidates(samples, table(), ["attention"], lambda *_: None)
    with pytest.raises(TargetError, match="is sm80, and sm90 is to be tuned"):
        tune.measure(tuned, compiled, Stopwatch(machine, lambda kernel: 1.0, sm=80), lambda *_: None)
    with pytest.raises(CapacityError, match=r"timing needs \d+ bytes of device memory, 64 are free"):
        tune.measure(tuned, compiled, Stopwatch(machine, lambda kernel: 1.0, nbytes=64), lambda *_: None)


# The table.


def test_the_table_comes_back_as_it_was_written_sorted_and_the_same_every_time(tmp_path):
    by_hand = {"op": "linear", "min_m": 8192, "block_m": 128, "block_k": 128, "warps": 8, "stages": 4}
    shapes = [
        Shape("moe_down", "f32", 90, 33, 64),
        Shape("linear", "bf16", 90, 64, 64),
        Shape("linear", "bf16", 80, 64, 64),
    ]
    found = [(shape, Blocks(32, 64, 8, 3)) for shape in shapes]
    first = Tiles([by_hand], "x").with_measured(found)
    again = Tiles([by_hand], "x").with_measured(reversed(found))
    assert first.to_yaml() == again.to_yaml()
    (tmp_path / "t.yaml").write_text(first.to_yaml())
    read = Tiles.read(tmp_path / "t.yaml")
    assert read.entries == first.entries and read.to_yaml() == first.to_yaml()
    assert [(e["op"], e.get("sm")) for e in read.entries] == [
        ("linear", [80]), ("linear", [90]), ("moe_down", [90]), ("linear", None),
    ]  # fmt: skip
    assert read.blocks(shapes[1]) == Blocks(32, 64, 8, 3)
    assert read.blocks(Shape("linear", "bf16", 90, 65, 64)) == rule(Shape("linear", "bf16", 90, 65, 64))
    newer = read.with_measured([(shapes[1], Blocks(16, 64, 4, 2))])
    assert newer.blocks(shapes[1]) == Blocks(16, 64, 4, 2) and len(newer.entries) == 4


@pytest.mark.parametrize(
    "text",
    ["{}", "- 3", "- {op: linear}", "- {op: other, block_m: 16, block_k: 16, warps: 4, stages: 2}",
     "- {op: linear, block_m: 24, block_k: 16, warps: 4, stages: 2}",
     "- {op: linear, block_m: 16, block_k: 16, warps: 4, stages: 2, sm: 90}",
     "- {op: linear, block_m: true, block_k: 16, warps: 4, stages: 2}",
     "- {op: linear, block_m: 16, block_k: 16, warps: 64, stages: 2}", "[", "\xff"],
)  # fmt: skip
def test_what_is_no_table_is_refused(text, tmp_path):
    (tmp_path / "t.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(EmitError, match="block sizes") as caught:
        find_target("triton:sm90").tune(tmp_path / "t.yaml")
    assert FORM in caught.value.fix or "`tmlc tune`" in caught.value.fix


def test_inputs_that_are_no_whole_groups_are_refused_when_a_product_is_lowered():
    entry = {"op": "linear", "block_m": 16, "block_k": 16, "warps": 4, "stages": 2}
    with pytest.raises(EmitError, match="slices of 16 inputs are no groups of i8g32"):
        lower(linear_call(Tiles([entry], "x")))


def test_compile_uses_a_table_and_other_targets_refuse_one(tiny, lab, tmp_path):
    entry = {"op": "linear", "block_m": 16, "block_k": 32, "warps": 8, "stages": 2}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump([entry]))
    out = lab.compile(tiny.checkpoint, tmp_path / "a.tmlc", tuning=tmp_path / "t.yaml")
    with open_package(out) as held:
        variants = [v for v in held.json("engines/triton/sm90/code.json")["variants"] if v["kernel"] == "linear_kernel"]
    assert variants and {(v["num_warps"], v["num_stages"], v["constexprs"]["BLOCK_M"]) for v in variants} == {
        (8, 2, 16)
    }
    with pytest.raises(UsageError, match="target cpu has no block sizes"):
        tmlc_compile_cpu(tiny.checkpoint, tmp_path)


def tmlc_compile_cpu(checkpoint, folder):
    import tmlc

    tmlc.compile(checkpoint, folder / "b.tmlc", tuning=folder / "t.yaml")


def test_the_key_of_the_compile_cache_changes_with_the_table(tiny, tmp_path):
    def key():
        options = {"tuning": tmp_path / "t.yaml", "context": None}
        chosen = dict(precision=None, preset=None, pipeline=None, passes=None, disable=(), options=options)
        return compile_key(tiny.checkpoint, target="triton:sm90", **chosen, memo=DigestMemo(None))

    (tmp_path / "t.yaml").write_text("[]\n")
    first, same = key(), key()
    (tmp_path / "t.yaml").write_text("[] # another\n")
    assert first.digest == same.digest != key().digest
    assert any(name.endswith("triton/tuning.yaml") for name in first.parts), "the checked-in table is a source"


# The verb.


def cli_run(*args, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in args])
    assert result.exit_code == code, f"exit {result.exit_code}\n{result.stdout}\n{result.stderr}"
    return result


def test_without_a_gpu_the_error_names_the_dry_run(tiny, tmp_path):
    said = cli_run("tune", tiny.gpu, "-o", tmp_path / "t.yaml", code=2).stderr
    assert "tuning measures on a GPU" in said and "--dry-run" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ([], "no output was given"),
        (["--dry-run", "--target", "cpu"], "target cpu has no block sizes"),
        (["--dry-run", "--target", "triton:sm80"], "the package has sm90, not sm80"),
        (["--dry-run", "--precision", "bf16"], "a package has its precision"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, args, match):
    assert match in cli_run("tune", tiny.gpu, *args, code=2).stderr


def test_a_package_for_another_target_is_told_by_its_own(tiny):
    said = cli_run("tune", tiny.cpu, "--dry-run", code=2).stderr
    assert "was compiled for cpu" in said and "cpu.tmlc" in said and "not sm" not in said


def test_a_dry_run_shows_registers_spills_and_shared_memory(tiny, monkeypatch):
    monkeypatch.setattr(tune, "build_variants", faked(spills=(4,)))
    view = json.loads(cli_run("tune", tiny.gpu, "--op", "moe_down", "--dry-run", "--json").stdout)
    (one,) = view["shapes"]
    assert view["table"] is None and view["device"] is None and one["chosen"] is None
    assert {c["registers"] for c in one["candidates"]} == {40} and {c["shared"] for c in one["candidates"]} == {1000}
    text = cli_run("tune", tiny.gpu, "--op", "linear", "--dry-run").stdout
    assert "spills 8 bytes" in text and "nothing was timed" in text


def test_the_verb_measures_and_keeps_what_the_table_had(tiny, tmp_path, monkeypatch, machine, few):
    held = {"op": "linear", "block_m": 32, "block_k": 32, "warps": 4, "stages": 3}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump([held]))
    with released(machine):
        monkeypatch.setattr(cli_tune, "open_driver", lambda: Stopwatch(machine, lambda k: 1e-6 / k.num_stages))
        view = json.loads(cli_run("tune", tiny.gpu, "--op", "moe_down", "-o", tmp_path / "t.yaml", "--json").stdout)
    (one,) = view["shapes"]
    entries = Tiles.read(tmp_path / "t.yaml").entries
    assert view["table"] and entries[-1] == held and entries[0]["op"] == "moe_down"
    assert {key: entries[0][key] for key in one["chosen"]} == one["chosen"]
    assert [p.name for p in tmp_path.iterdir()] == ["t.yaml"]


def test_a_checkpoint_gives_the_shapes_of_its_package(tiny, samples):
    _, found = cli_tune._samples(tiny.checkpoint, "triton:sm90", None, lambda *_: None)
    assert {shape for shape, _ in found} == {shape for shape, _ in samples}


def test_candidates_give_the_same_bits(machine):
    """A product of one position with 8-bit weights, and attention in a bfloat16 cache."""
    for make, seed in ((linear_call, 1), (attention_call, 2)):
        made = [one for one in lower(make(table())).launches if one.kernel in tune.KERNELS][:1]
        shape = tune.shape_of(made[0], 90)
        seen = {interpreted(machine, lower(make(table().with_measured([(shape, b)]))), seed).tobytes()
                for b in spread(tune.candidates(shape, table()))}  # fmt: skip
        assert len(seen) == 1, shape.name
        values = np.frombuffer(seen.pop(), np.float32)
        assert np.isfinite(values).all() and len(np.unique(values)) > values.size // 2


def spread(candidates):
    """One candidate for each pair of blocks, warps and stages varying (the interpreter does not know these)."""
    picked = {(b.block_m, b.block_k): b for b in candidates}
    return list(picked.values()) + candidates[-1:]


def interpreted(machine, lowered, seed):
    """The output of launches over numbers that `seed` decides."""
    from tmlc.kernels.triton.launch import Pointer

    with released(machine):
        sizes: dict = {}
        for launch in lowered.launches:
            for arg in launch.args:
                if isinstance(arg, Pointer):
                    key = (arg.space, arg.name)
                    sizes[key] = max(sizes.get(key, 0), arg.offset + arg.nbytes)
        buffers = {key: machine.bytes(size) for key, size in sorted(sizes.items())}
        draw = np.random.default_rng(seed)
        for (space, name), buffer in buffers.items():
            if name.endswith(".scales"):
                buffer.view(np.float16)[:] = 0.01
            elif space == "weight":
                buffer[:] = draw.integers(0, 256, buffer.size)
            elif space == "input":
                buffer.view(np.float32)[:] = draw.standard_normal(buffer.size // 4)
        buffers["slots", ""] = machine.array((1,), np.int64)
        buffers["counts", ""] = machine.put(np.full(1, 4, np.int32))
        machine.run(lowered.launches, buffers)
        return buffers["output", "0"].copy()
