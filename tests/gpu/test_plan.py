"""The plan of a Triton engine: read strictly, every pointer inside what it points into, and clear errors when it does
not fit the device."""

import copy
import hashlib
import json
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tmlc.emit.targets import find_target
from tmlc.emit.triton.host_device import HostDevice
from tmlc.errors import CapacityError, PackageError, PlanError, TargetError, TmlcError, UsageError
from tmlc.package.reader import open_package
from tmlc.runtimes.core.placement import Placement
from tmlc.runtimes.cuda.backend import CudaBackend, choose_architecture, open_backend
from tmlc.runtimes.cuda.driver import DeviceInfo
from tmlc.runtimes.cuda.plan import PointerArg, read_plan

TINY = yaml.safe_load((Path(__file__).parents[2] / "perf/gpu/tiny.yaml").read_text("utf-8"))


def read(parsed, change=lambda plan, code: None):
    plan, code = json.loads(parsed.plan), json.loads(parsed.code)
    change(plan, code)
    return read_plan(plan, code, 90, parsed.tensors)


def test_the_plan_of_a_package_is_read_as_it_was_written(parsed):
    plan, code = json.loads(parsed.plan), json.loads(parsed.code)
    made = read(parsed)
    assert [m.spec.name for m in made.methods.values()] == [m["name"] for m in plan["methods"]]
    assert len(made.variants) == len(code["variants"]) == len({v.name for v in made.variants})
    for method in plan["methods"]:
        read_buckets = made.methods[method["name"]].buckets
        assert [[b.batch, b.n] for b in read_buckets] == method["buckets"]
        for bucket in read_buckets:
            assert len(bucket.launches) == len(code["code"][method["name"]][f"b{bucket.batch}n{bucket.n}"])
            assert not [at for at in (bucket.counts, *bucket.inputs, *bucket.outputs) if at % 256]


def test_every_pointer_of_every_bucket_lies_inside_its_space(parsed):
    made = read(parsed)
    spaces = set()
    for method in made.methods.values():
        for bucket in method.buckets:
            for launch in bucket.launches:
                for arg in launch.args:
                    if isinstance(arg, PointerArg):
                        spaces.add(arg.space)
                        assert arg.nbytes > 0, made.variants[launch.variant].name
    assert spaces == {"weight", "arena", "state", "input", "output", "scratch", "slots", "counts"}


def test_speech_is_made_of_products_and_nothing_is_copied(parsed):
    """What stands behind a product is part of its launch (fuse.steps, fuse.linear_and_conv, fuse.swiglu), and so is the
    norm before it (fuse.norm_linear); the modulations of all flow times are one product (fuse.flow_times), and results
    lie where they are wanted."""
    code, config = json.loads(parsed.code), TINY["speech_config"]

    def kernels(method):
        return Counter(code["variants"][variant]["kernel"] for variant, _, _ in code["code"][method]["b1n1"])

    steps, layers = config["flow_steps"], config["flow_layers"]
    assert kernels("speak") == {
        "philox_normal_kernel": 1, "silu_add_rows_kernel": 1, "linear_kernel": 2 + steps * (2 * layers + 2),
    }  # fmt: skip
    assert kernels("vocode") == {"linear_kernel": 3 + 2 * config["vocoder_layers"], "overlap_add_kernel": 1}
    assert kernels("unembed") == {"linear_kernel": 1}


def launches(code):
    return [launch for buckets in code["code"].values() for found in buckets.values() for launch in found]


def pointers(code):
    return [arg for launch in launches(code) for arg in launch[2] if isinstance(arg, list)]


def test_a_pointer_that_leaves_its_space_by_a_byte_is_refused(parsed):
    """Moved to just behind its space, for every pointer of some launches of each space."""
    code = json.loads(parsed.code)
    found = pointers(code)
    for space in range(8):
        place = next(i for i, p in enumerate(found) if p[0] == space)

        def grow(plan, code, place=place):
            pointers(code)[place][3] = 2**40

        with pytest.raises(PlanError, match="ends at"):
            read(parsed, grow)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p, c: p.update(version=2), "version 2"),
        (lambda p, c: c.update(version=0), "version 0"),
        (lambda p, c: p.update(extra=1), "'extra' is not known"),
        (lambda p, c: p.pop("arena_bytes"), "'arena_bytes' is missing"),
        (lambda p, c: p.update(arena_bytes=64), "ends at"),
        (lambda p, c: p.update(slot_bytes=8), "outside the slot|ends at"),
        (lambda p, c: p["weights"].__setitem__(0, "nothing"), "not in the package"),
        (lambda p, c: p["methods"][0]["buckets"].append([3, 3]), "other buckets"),
        (lambda p, c: p["methods"][0]["buckets"].__setitem__(0, [9, 9]), "has no code"),
        (lambda p, c: p["methods"].append(p["methods"][0]), "not those of plan.json"),
        (lambda p, c: p["methods"][0].update(ids=[]), "a limit for each input"),
        (lambda p, c: p["methods"][0]["inputs"][0].update(dtype=["f32"]), "unknown dtype this list"),
        (lambda p, c: c["variants"].__delitem__(slice(3, None)), "expected a whole number"),
        (lambda p, c: c["variants"][0].update(num_warps=3), "num_warps"),
        (lambda p, c: c["variants"][0].update(shared=10**6), "shared"),
        (lambda p, c: c["variants"][0]["signature"].append("i32"), "does not fit"),
        (lambda p, c: c["variants"][0]["signature"].__setitem__(0, "struct"), "unknown type"),
        (lambda p, c: launches(c)[0][1].__setitem__(0, 0), "grid"),
        (lambda p, c: launches(c)[0].__setitem__(0, -1), "expected a whole number"),
        (lambda p, c: pointers(c)[0].__setitem__(2, 1), "aligned|ends at"),
        (lambda p, c: pointers(c)[0].__setitem__(0, 9), "expected a whole number"),
        (lambda p, c: next(x for x in pointers(c) if x[0] == 3).__setitem__(1, 7), "there is no input 7"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(parsed, change, match):
    with pytest.raises(TmlcError, match=match) as raised:
        read(parsed, change)
    assert isinstance(raised.value, PlanError | PackageError)


@pytest.mark.parametrize("seed", range(60))
def test_noise_in_a_plan_is_an_error_or_a_plan_within_its_bounds(parsed, seed):
    draw = random.Random(seed)

    def spoil(value):
        if isinstance(value, dict):
            key = draw.choice(sorted(value))
            deeper = value[key] and draw.random() < 0.9
            value[key] = spoil(value[key]) if deeper else draw.choice([None, -1, "x", [], {}])
        elif isinstance(value, list) and value:
            place = draw.randrange(len(value))
            value[place] = spoil(value[place]) if draw.random() < 0.95 else draw.choice([None, 2**70, 1.5, "x", []])
        else:
            return draw.choice([None, True, -1, 0, 2**40, 2**70, 1e308, "x", [], {}])
        return value

    try:
        made = read(parsed, lambda plan, code: spoil(draw.choice([plan, code])))
    except (PlanError, PackageError):
        return
    assert made.slot_bytes <= 2**46 and made.methods


@pytest.mark.parametrize(
    ("held", "device", "chosen"),
    [
        ([80, 90], 90, 90), ([80], 80, 80), ([80], 86, 80), ([80, 89], 89, 89), ([80], 89, 80), ([89, 120], 120, 120),
        ([100, 103], 103, 103), ([121, 120], 121, 121),
    ],
)
def test_the_machine_code_that_a_device_runs(held, device, chosen):
    assert choose_architecture(held, device, "x") == chosen


@pytest.mark.parametrize(
    ("held", "device", "named"),
    [
        ([90], 80, "sm80"), ([89], 86, "sm80"), ([80], 90, "sm90"), ([90], 100, "sm100"), ([100], 103, "sm103"),
        ([100], 120, "sm120"), ([120], 121, "sm121"), ([], 90, "sm90"), ([90], 89, "sm89"),
    ],
)  # fmt: skip
def test_another_architecture_is_one_clear_error(held, device, named):
    """It names a target that there is."""
    with pytest.raises(TargetError, match=rf"GPU X is sm{device}.*\n  compile .* --target triton:{named}$"):
        choose_architecture(held, device, "GPU X")
    assert find_target(f"triton:{named}").architectures == (int(named[2:]),)


@pytest.mark.parametrize("device", [75, 87, 110, 130])
def test_a_device_that_no_kernel_is_compiled_for_gets_no_target_named(device):
    """87 is Tegra's: it does not run code for desktops and servers of its own major version."""
    with pytest.raises(TargetError, match=r"use another GPU .* sm80 \(A100.*sm121 \(GB10") as caught:
        choose_architecture([80, 90], device, "GPU X")
    assert f"sm{device}" not in caught.value.fix


def opened(package, machine, **more):
    with open_package(package) as held:
        device = HostDevice.of(held, machine)
        for name, value in more.items():
            setattr(device, name, value)
        try:
            return CudaBackend(held, "triton:sm90", device)
        finally:
            assert device.closed or not more


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"info": DeviceInfo("GPU X", 75, 12080)}, TargetError, "has machine code for sm90; GPU X is sm75"),
        (
            {"info": DeviceInfo("GPU X", 90, 11040)}, TargetError,
            r"supports CUDA 11\.4, the engine needs 1\d\.0.*\n  update the driver$",
        ),
        (
            {"info": DeviceInfo("GPU X", 90, 11080)}, TargetError,
            r"CUDA 11\.8, the engine needs 1\d\.0.*\n  update the driver, or compile with an assembler of its CUDA",
        ),
        ({"nbytes": 4096}, CapacityError, r"needs \d+ bytes of device memory, 4096 of 4096 are free"),
        ({"kernels": {}}, TmlcError, "machine code that this device was not told of"),
    ],
)
def test_what_does_not_fit_the_device_is_said_before_anything_runs(tiny, machine, more, error, match):
    with pytest.raises(error, match=match):
        opened(tiny.gpu, machine, **more)


def test_sessions_that_do_not_fit_name_the_bytes_asked_for_and_free(tiny, machine):
    mark = machine.mark()
    backend = opened(tiny.gpu, machine)
    backend.driver.nbytes -= backend.driver.memory()[0] - 100
    with pytest.raises(CapacityError, match=r"3 sessions take \d+ bytes of device memory, 100 are free"):
        backend.slots(3)
    with pytest.raises(UsageError):
        backend.slots(0)
    backend.close()
    machine.release(mark)


def rewritten(package, out, change):
    """The members of a package, changed, in a folder that a reader accepts (with `verify` off)."""
    with zipfile.ZipFile(package) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    manifest = json.loads(members.pop("manifest.json"))
    manifest["files"] = {n: i for n, i in manifest["files"].items() if n in members}
    for name, data in members.items():
        manifest["files"][name].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    text = json.dumps(manifest).encode()
    (out / "manifest.json").write_bytes(text)
    (out / "SHA256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    return out


@pytest.mark.parametrize("kernel", ["linear_kernel", "take_rows_kernel"])
def test_a_missing_variant_is_an_error_that_names_it(tiny, machine, tmp_path, kernel):
    """One of a method's, and the one that stands between the methods of a tick."""
    gone = []

    def drop(members):
        gone.append(next(name for name in members if name.endswith(".cubin") and kernel in name))
        del members[gone[0]]

    package = rewritten(tiny.gpu, tmp_path, drop)
    with open_package(package) as held, pytest.raises(PackageError, match="is missing") as raised:
        CudaBackend(held, "triton:sm90", HostDevice.of(held, machine))
    assert gone[0] in str(raised.value) and "never compiled while serving" in str(raised.value)


def test_machine_code_that_is_not_the_plans_is_refused(tiny, machine, tmp_path):
    def swap(members):
        first, second = [name for name in members if name.endswith(".cubin")][:2]
        members[first] = members[second]

    package = rewritten(tiny.gpu, tmp_path, swap)
    with open_package(package) as held, pytest.raises(PackageError, match="not what the plan lists") as raised:
        CudaBackend(held, "triton:sm90", HostDevice.of(held, machine))
    assert "get the package again from its source" in raised.value.fix


def test_a_package_of_other_kernels_than_those_here_does_not_run_in_host_memory(tiny, machine, tmp_path):
    """Where nothing runs its machine code, kernels are made from the source here."""

    def alter(members):
        code = json.loads(members["engines/triton/sm90/code.json"])
        code["variants"][0]["signature"].append("i32")
        members["engines/triton/sm90/code.json"] = json.dumps(code).encode()

    package = rewritten(tiny.gpu, tmp_path, alter)
    with open_package(package) as held, pytest.raises(PackageError, match="takes other arguments than the kernel here"):
        HostDevice.of(held, machine)


def test_settings_of_other_targets_are_refused(tiny):
    with open_package(tiny.gpu) as held:
        placed = {option: {"placement": Placement(**{option: True})} for option in ("pin", "lock_memory", "huge_pages")}
        for option, more in {"isa": {"isa": "v4"}, "portable_bits": {"portable_bits": True}, **placed}.items():
            with pytest.raises(UsageError, match=f"^{option} is for the target cpu, not for triton:sm90"):
                open_backend(held, "triton:sm90", 1, **more)


def test_the_reader_changes_nothing_that_it_reads(parsed):
    plan, code = json.loads(parsed.plan), json.loads(parsed.code)
    before = copy.deepcopy((plan, code))
    read_plan(plan, code, 90, parsed.tensors)
    assert (plan, code) == before
