"""Checkpoints that we never saw, on a device in host memory: random models of every family that the frontend takes, of
sizes between those that kernels are tuned for, against transformers.

A session's logits are those of transformers as long as it holds all positions, and those of the CPU engine when layers
without a window have forgotten some; its bits are the same alone, in company and cut otherwise.
"""

from __future__ import annotations

import random
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import inkling2_models
import numpy as np
import pytest
import torch
from random_models import odd_sizes, random_model
from stored_codes import THERE, WAYS, store

import tmlc
from tmlc.emit.targets import find_target
from tmlc.frontend import open_checkpoint
from tmlc.frontend.foreign import families
from tmlc.ir.run import ProgramRunner
from tmlc.kernels.triton.ptx.host import PtxMachine
from tmlc.package.reader import open_package
from tmlc.passes.match import arg
from tmlc.pipeline.pipeline import load_pipeline

CONFORMANCE = Path(__file__).parents[1] / "conformance"
CONTEXT, SINKS, APPEND, POSITIONS = 24, 4, 8, 34
#: Of each family by PTX; bf16 where no router can be near a tie.
PRECISIONS = ["int8", "fp8", "int4", "fp8", "int8", "fp8", "int4", "int8", "bf16", "bf16", "int4"]
BUCKETS = {"batch": [1, 2], "positions": [1, 4]}
BOUNDS = dict(context=CONTEXT, context_policy="ring_with_sinks", sinks=SINKS, max_append=APPEND)


def append(session, ids, sizes):
    """Logits of `ids`, appended in parts of these sizes, over and over."""
    at, parts = 0, []
    while at < len(ids):
        count = sizes[len(parts) % len(sizes)]
        parts.append(session.append(tokens=ids[at : at + count]))
        at += count
    return np.concatenate(parts)


def states(*sessions):
    return [session.engine.slots.memory.read(session.index) for session in sessions]


def steady(lab, engine, ids, seed):
    """The logits of `ids`, after holding the bits of two sessions, with long and short pasts, in company to those of
    their twins alone, whose pasts were cut otherwise."""
    draw = random.Random(seed)
    with engine.session() as long, engine.session() as short, engine.session() as twin:
        logits = append(long, ids, [draw.randint(1, APPEND) for _ in range(9)])
        assert np.array_equal(append(twin, ids, [APPEND, 1, 3]), logits), "another cut"
        assert states(long) == states(twin)
        append(short, ids[:3], [3])
        with short.fork() as beside:
            for counts in ((2, 4), (1, 1)):
                apart = [lab.decode(engine, [part])[0] for part in ((short, counts[1]), (long, counts[0]))]
                together = lab.decode(engine, [(beside, counts[1]), (twin, counts[0])])
                for one, other in zip(together, apart, strict=True):
                    assert one.tobytes() == other.tobytes(), "in company"
                assert states(long, short) == states(twin, beside)
    return logits


def usual_error(found, expected):
    """Root mean square error of a position, for the worst but a fifth of them: where a router was near a tie another
    expert answers, and the error there says nothing of the arithmetic."""
    return float(np.quantile(np.sqrt(np.mean(np.square(found - expected), 1)), 0.8))


@torch.no_grad()
def transformers_logits(model, ids):
    return model(torch.tensor(ids)[None], use_cache=False).logits[0].float().numpy()


def by_cpu(folder, ids):
    """What the CPU engine says, whose rings forget the same positions."""
    tmlc.compile(folder, folder.parent / "cpu.tmlc", precision="fp32", **BOUNDS)
    with tmlc.load(folder.parent / "cpu.tmlc", threads=1) as engine, engine.session() as session:
        return append(session, ids, [APPEND])


def dequantised(lab, folder, precision, ids):
    """What eager PyTorch makes of the program that the engine was made from, with the values of its codes; and three
    times more, of inputs that are moved as far as bfloat16 rounds, which tips over what is near a tie."""
    checkpoint = open_checkpoint(folder)
    program = tmlc.compile(
        checkpoint, "unused", target=lab.target, precision=precision, stop_after="memory.buckets", **BOUNDS
    ).program
    runner, found = ProgramRunner(program, checkpoint), []
    for moved in range(4):
        session, parts, noise = runner.session(), [], torch.Generator().manual_seed(moved)
        for at in range(0, len(ids), APPEND):
            (x,) = session.call("embed_text", torch.tensor(ids[at : at + APPEND])[:, None])
            if moved:
                x = x * (1 + 2.0**-8 * torch.randn(x.shape, generator=noise))
            (hidden,) = session.call("decode", x)
            parts.append(session.call("unembed", hidden)[0].numpy())
        found.append(np.concatenate(parts))
    return found


def hold(lab, machine, model, folder, precision="fp32", seed=0, positions=POSITIONS, rounded=0.0):
    """Holds the engine of the checkpoint in `folder` to `model`, over that many positions; in float32 to 1e-4, or to
    `rounded` times what rounding of the weights does to the model."""
    made = model.config.get_text_config()
    vocabulary = getattr(made, "unpadded_vocab_size", None) or made.vocab_size
    ids = np.random.default_rng(seed).integers(0, vocabulary, positions).tolist()
    lab.compile(folder, folder.parent / "gpu.tmlc", precision, buckets=BUCKETS, grouped_from=5, **BOUNDS)
    mark = machine.mark()
    with lab.load(folder.parent / "gpu.tmlc", machine, 4) as engine:
        logits = steady(lab, engine, ids, seed)
    machine.release(mark)
    expected, first = transformers_logits(model, ids[:CONTEXT]), logits[:CONTEXT]
    assert 0.3 < expected.std() < 3.0, "the bounds are meant for logits of unit scale"
    if precision == "fp32":
        moved = inkling2_models.rounding(model, ids[:CONTEXT], expected) if rounded else 0.0
        bound = max(1e-4, rounded * moved)
        assert np.abs(first - expected).max() <= bound
        if positions > CONTEXT + APPEND:
            assert np.abs(by_cpu(folder, ids) - logits).max() <= bound
    elif precision == "bf16":
        how = {"attn_implementation": "eager", "experts_implementation": "eager"}
        rounded = type(model).from_pretrained(folder, dtype=torch.bfloat16, **how)  # keeps what it wants in float32
        theirs = transformers_logits(rounded, ids[:CONTEXT])
        assert usual_error(first, expected) <= 1.5 * usual_error(theirs, expected)
    else:
        wanted, *moved = dequantised(lab, folder, precision, ids)
        allowed = 1.5 * max(usual_error(one, wanted) for one in moved)
        assert usual_error(logits, wanted) <= max(2e-2, allowed)


@pytest.fixture
def odd(tmp_path):
    """(family, seed) → a model of odd sizes, and the folder of its checkpoint."""

    def make(family, seed):
        model = random_model(family, seed, **odd_sizes(family, seed))
        model.save_pretrained(tmp_path / "checkpoint")
        return model, tmp_path / "checkpoint"

    return make


@pytest.mark.parametrize(("family", "precision"), [("gpt_oss", "bf16"), ("deepseek_v3", "fp32")])
def test_the_engine_equals_transformers(lab, machine, tmp_path, family, precision):
    model = random_model(family, 3)
    model.save_pretrained(tmp_path / "checkpoint")
    hold(lab, machine, model, tmp_path / "checkpoint", precision, positions=10)


@pytest.mark.parametrize(
    ("family", "precision"),
    [("qwen3_moe", "bf16"), ("olmoe", "int8"), ("mixtral", "fp8"), ("gpt_oss", "bf16"), ("deepseek_v3", "fp8"),
     ("glm4_moe", "fp32")],
)  # fmt: skip
def test_the_experts_of_a_layer_are_chosen_in_two_launches(lab, tmp_path, family, precision):
    """Whatever other passes do around it: no norm and no product of a router stay apart. Of few rows and without groups
    the second launch is that of the experts."""
    random_model(family, 0).save_pretrained(tmp_path / "checkpoint")
    steps = load_pipeline("triton").configure("memory.buckets", **BUCKETS)
    bounds = BOUNDS | {"stop_after": "memory.buckets", "pipeline": steps}
    program = tmlc.compile(tmp_path / "checkpoint", "x", target=lab.target, precision=precision, **bounds).program
    (fused,) = (record for record in program.record if record.name == "fuse.norm_topk_router")
    experts = program.methods["decode"].calls("norm_topk_moe")
    assert (fused.matches, fused.near_misses) == (len(experts), []) and experts
    for launches in find_target(lab.target).lower(program).launches[90]["decode"].values():
        kernels = [launch.kernel for launch in launches]
        few, groups = "moe_sort_kernel" not in kernels, arg(experts[0], "groups")
        assert kernels.count("router_logits_kernel") == kernels.count("moe_gate_up_kernel") == len(experts)
        assert kernels.count("topk_router_kernel") == (0 if few and groups == 1 else len(experts))


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_engines_of_odd_sizes_equal_transformers(lab, machine, odd, family):
    hold(lab, machine, *odd(family, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), list(zip(families(), PRECISIONS, strict=True)))
def test_what_the_compiler_makes_of_odd_sizes(lab, odd, family, precision):
    """Other precisions, and by PTX."""
    with PtxMachine(90) as machine:
        hold(lab, machine, *odd(family, 2), precision, 2, positions=20)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "write", "changes"), WAYS)
@pytest.mark.skipif(not THERE, reason="needs the dequantiser of transformers 5.22")
def test_a_stored_quantised_checkpoint_gives_the_package_of_its_dequantised_twin(lab, tmp_path, family, write, changes):
    """MXFP4 experts and FP8 blocks, as gpt-oss and DeepSeek-V3 come: the same launches over the same bytes."""
    random_model(family, 0, **changes).save_pretrained(tmp_path / "plain")
    store(tmp_path / "plain", tmp_path / "stored", write)
    found = []
    for name in ("plain", "stored"):
        lab.compile(tmp_path / name, tmp_path / f"{name}.tmlc", "int8", buckets=BUCKETS, **BOUNDS)
        with open_package(tmp_path / f"{name}.tmlc") as package:
            files = [file for file in package.names() if file.startswith(("engines/", "weights"))]
            found.append({file: package.read(file) for file in files})
    assert len(found[0]) > 20 and found[0] == found[1]


def room(name):
    """A module of the conformance tests, for the configs that it draws."""
    spec = spec_from_file_location(name, CONFORMANCE / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 3])
def test_inkling_engines_equal_transformers(lab, machine, tmp_path, number):
    inkling = room("test_inkling_text")
    name = sorted(inkling.CONFIGS)[number]
    model = inkling.random_model(inkling.CONFIGS[name], len(name))
    model.save_pretrained(tmp_path / "checkpoint")
    hold(lab, machine, model, tmp_path / "checkpoint", "bf16" if number == 3 else "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_inkling2_engines_equal_transformers(lab, machine, tmp_path, seed):
    model = inkling2_models.random_model(inkling2_models.draw(seed), seed)
    model.save_pretrained(tmp_path / "checkpoint")
    hold(lab, machine, model, tmp_path / "checkpoint", "bf16" if seed == 3 else "fp32", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_looped_inkling2_engines_equal_transformers(lab, machine, tmp_path, seed):
    model = inkling2_models.random_model(inkling2_models.looped(seed), seed)
    model.save_pretrained(tmp_path / "checkpoint")
    hold(lab, machine, model, tmp_path / "checkpoint", seed=seed, rounded=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_what_an_inkling_hears_and_sees_is_what_transformers_does(lab, machine, tmp_path, monkeypatch, seed):
    inkling = room("test_inkling_mm")
    monkeypatch.setattr(inkling, "POSITIONS", 16)
    config, processor = inkling.draw(seed)
    model = inkling.random_model(config, seed)
    inkling.save(model, processor, tmp_path / "checkpoint")
    given = inkling.Mixed(config, processor, seed)
    assert {"audio", "image"} & {kind for kind, _ in given.pieces}
    lab.compile(tmp_path / "checkpoint", tmp_path / "gpu.tmlc", buckets=BUCKETS, context=128, max_append=APPEND)
    mark = machine.mark()
    with lab.load(tmp_path / "gpu.tmlc", machine, 2) as engine, engine.session() as one, engine.session() as other:
        whole = given.append_whole(one)
        assert np.array_equal(given.append_chunked(other, seed), whole) and states(one) == states(other)
    machine.release(mark)
    assert np.abs(whole - inkling.expect(model, given.inputs())).max() <= 1e-4
