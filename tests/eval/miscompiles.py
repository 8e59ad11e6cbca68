"""Mistakes that a compiler could make, seeded into a compilation from outside, and which scores of the suite tell them.

    python tests/eval/miscompiles.py CHECKPOINT [--episodes 24] [--only NAME,…] [--tasks TASK,…]

An edit of the program either comes before all passes, and keeps every rule of the IR; or it comes behind them, just
before the program is lowered to a plan, where the verifier no longer looks. Nothing in tmlc knows of this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx

import tmlc
from tmlc import compiler
from tmlc.emit.cpu_target import CpuTarget
from tmlc.eval.suite import chosen_tasks, evaluate
from tmlc.ir.program import Method, Program, call, replace, role, type_of, uses
from tmlc.passes.match import arg, op_of
from tmlc.pipeline.pass_base import Pass, PassContext, PassResult
from tmlc.pipeline.pipeline import Pipeline, Step, load_pipeline


@dataclass(frozen=True)
class Miscompile:
    """One mistake.

    Attributes:
        name, about: what went wrong.
        edit: changes a program in place; returns how many places it changed.
        tasks: those of the suite that are played to tell it.
        lowered: the edit comes behind the passes.
        subtle: the shipped weights do not mind it, so no score tells it; it is here so that the table says so.
    """

    name: str
    about: str
    edit: Callable[[Program], int]
    tasks: tuple[str, ...]
    lowered: bool = False
    subtle: bool = False


# Edits of weights: what the graphs read is made of the right weight by the wrong rule.


def _reread(program: Program, ends: str, remake: Callable[[str], str]) -> int:
    """Lets the graphs read `remake(name)` in place of each weight whose name ends with `ends`."""
    names = [name for name in list(program.weights) if name.endswith(ends)]
    made = {name: remake(name) for name in names}
    for method in program.methods.values():
        for node in method.placeholders("weight"):
            name = role(node)[1]
            if name in made and node.users:
                node.replace_all_uses_with(program.add_weight_input(method, made[name]))
    return len(names)


def _pieces(program: Program, name: str, axis: int, order: Sequence[tuple[int, int]]) -> str:
    """The slices of a weight along an axis, put together again in this order."""
    weights, parts = program.weights, []
    for number, (start, stop) in enumerate(order):
        parts.append(weights.slice(f"{name}.part{number}", name, axis, start, stop))
    return weights.concat(f"{name}.remade", parts, axis)


def swap_experts(program: Program) -> int:
    def remake(name: str) -> str:
        experts = program.weights[name].shape[0]
        return _pieces(program, name, 0, [(e ^ 1, (e ^ 1) + 1) for e in range(experts)])

    return _reread(program, "experts.gate_up_proj", remake)


def swap_gate_and_up(program: Program) -> int:
    def remake(name: str) -> str:
        rows = program.weights[name].shape[1]
        return _pieces(program, name, 1, [(rows // 2, rows), (0, rows // 2)])

    return _reread(program, "experts.gate_up_proj", remake)


def shift_bias(program: Program, by: int = 1) -> int:
    def remake(name: str) -> str:
        extent = program.weights[name].shape[1]
        return _pieces(program, name, 1, [(by, extent), (extent - by, extent)])

    return _reread(program, "rel_logits_proj.proj", remake)


def shift_tokens(program: Program) -> int:
    def remake(name: str) -> str:
        rows = program.weights[name].shape[0]
        return _pieces(program, name, 0, [(1, rows), (0, 1)])

    return _reread(program, "embed_tokens.weight", remake)


def reverse_taps(program: Program) -> int:
    def remake(name: str) -> str:
        taps = program.weights[name].shape[-1]
        axis = len(program.weights[name].shape) - 1
        return _pieces(program, name, axis, [(t, t + 1) for t in reversed(range(taps))])

    return _reread(program, "_sconv.conv1d.weight", remake)


def transpose_pixels(program: Program) -> int:
    """The first layer of the video stem reads the pixels of a block column by column."""
    weights = program.weights
    (blocks,) = [node for method in program.methods.values() for node in method.calls("patchify")]
    frames, side = arg(blocks, "folds")[:2]

    def remake(name: str) -> str:
        shape = weights[name].shape
        apart = weights.reshape(f"{name}.apart", name, (shape[0], frames, side, side, 3))
        turned = weights.transpose(f"{name}.turned", apart, (0, 1, 3, 2, 4))
        return weights.reshape(f"{name}.remade", turned, shape)

    return _reread(program, "encoder_layers.0.projection.weight", remake)


def regroup_heads(program: Program) -> int:
    """Query heads are dealt out to the key and value heads in turn, where neighbours should share one."""
    weights, changed = program.weights, 0
    for node in program.methods["decode"].calls("attention"):
        groups, heads = arg(node, "num_kv_heads"), arg(node, "num_heads")
        product = arg(node, "q")
        while op_of(product) != "linear":
            product = product.args[0]
        name = role(arg(product, "weight"))[1]
        shape = weights[name].shape
        apart = weights.reshape(f"{name}.apart", name, (groups, heads // groups, shape[0] // heads * shape[1]))
        turned = weights.transpose(f"{name}.turned", apart, (1, 0, 2))
        made = weights.reshape(f"{name}.remade", turned, shape)
        changed += _reread(program, name, lambda name, made=made: made)
    return changed


def lose_overlap(program: Program) -> int:
    """What a frame of the vocoder writes beyond its own hop is lost."""
    changed = 0
    for method in program.methods.values():
        for node in method.calls("overlap_add"):
            name, hop = role(arg(node, "window"))[1], arg(node, "hop")
            width = type_of(arg(node, "window")).cols
            kept = program.weights.slice(f"{name}.kept", name, 1, 0, hop)
            none = program.weights.constant(f"{name}.none", torch.zeros(1, width - hop))
            made = program.weights.concat(f"{name}.remade", [kept, none], 1)
            changed += _reread(program, name, lambda name, made=made: made)
    return changed


# Edits of graphs.


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Another value for an argument of a call."""
    at = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
    node.update_arg(at, value)


def _delay(program: Program, method: Method, x: fx.Node, rows: int) -> None:
    """Every reader of `x` gets what was there `rows` rows before."""
    cols = type_of(x).cols
    name = f"late.{method.name}.{rows}.{cols}"
    if name not in program.weights:
        taps = torch.zeros(cols, rows + 1)
        taps[:, 0] = 1
        program.weights.constant(name, taps)
    weight, readers = program.add_weight_input(method, name), uses(x)
    with method.graph.inserting_before(readers[0]):
        late = call(method.graph, "short_conv", (x, weight, False))
    for reader in readers:
        reader.replace_input_with(x, late)


def shift_mask(program: Program, by: int = 1) -> int:
    """A position sees those up to `by` before it, and none that is nearer."""
    decode = program.methods["decode"]
    nodes = decode.calls("attention")
    for node in nodes:
        for what in ("k", "v"):
            _delay(program, decode, arg(node, what), by)
    # The key at distance d lies further back now, and gets the bias of where it is.
    return len(nodes) and shift_bias(program, by)


def shift_mask_by_a_block(program: Program) -> int:
    return shift_mask(program, 16)


def wrap_early(program: Program) -> int:
    """The ring of a global layer wraps after 64 positions."""
    bounds = program.meta["context"]
    bounds["limit"] = bounds["sinks"] + 64
    return sum(arg(node, "window") == 0 for node in program.methods["decode"].calls("attention"))


def stale_audio(program: Program) -> int:
    """The stem hears the samples of the tick before."""
    method = program.methods["embed_audio"]
    (node,) = method.calls("dmel")
    _delay(program, method, arg(node, "pcm"), program.meta["tick"]["audio_in"])
    return 1


def stale_video(program: Program) -> int:
    """The stem gives the positions of the clip before."""
    method = program.methods["embed_video"]
    last = method.calls()[-1]
    (out,) = method.outputs
    assert last is out
    _delay(program, method, arg(last, "x"), program.meta["tick"]["video_positions"])
    return 1


def stale_hidden(program: Program) -> int:
    """The flow head reads the hidden state of the position before."""
    method = program.methods["speak"]
    _delay(program, method, method.inputs[0], 1)
    return 1


def lose_route_scale(program: Program) -> int:
    nodes = program.methods["decode"].calls("sink_router")
    for node in nodes:
        _set(node, "route_scale", 1.0)
    return len(nodes)


def lose_self_voice(program: Program) -> int:
    (node,) = program.methods["embed_speech"].calls("add_row")
    replace(node, arg(node, "x"))
    return 1


def stop_flow_time(program: Program) -> int:
    nodes = program.methods["speak"].calls("add_row")
    for node in nodes:
        _set(node, "index", 0)
    return len(nodes)


# Edits behind the passes.


def _share(program: Program, op_names: Sequence[str], states: Sequence[str]) -> int:
    """All calls of these ops whose states have one shape use the states of the first of them."""
    changed, first = 0, {}
    for node in program.methods["decode"].calls():
        if op_of(node) not in op_names:
            continue
        here = tuple(arg(node, name) for name in states)
        if any(state is None for state in here):
            continue
        owned = first.setdefault(tuple(type_of(state) for state in here), here)
        if owned is not here:
            for name, state in zip(states, owned, strict=True):
                _set(node, name, state)
            changed += 1
    return changed


def share_tails(program: Program) -> int:
    return _share(program, ("linear_conv_state", "moe_conv_state", "short_conv_state"), ("tail",))


def share_rings(program: Program) -> int:
    return _share(program, ("attention_state",), ("k_cache", "v_cache"))


_BOTH = ("turn_taking", "rep_count")
MISCOMPILES = (
    Miscompile("mask_off_by_one", "a position does not see itself", shift_mask, ("time_speak",), subtle=True),
    Miscompile("mask_off_by_a_block", "a position sees blocks of 16 before it only", shift_mask_by_a_block, _BOTH),
    Miscompile("ring_wraps_early", "global rings wrap after 64 positions", wrap_early, ("time_speak", "cue_speak")),
    Miscompile("rings_shared", "layers of one shape share one ring", share_rings, _BOTH, lowered=True),
    Miscompile("tail_lost", "short convolutions overwrite each other's tail", share_tails, _BOTH, lowered=True),
    Miscompile("experts_swapped", "experts 0 and 1, 2 and 3, … are swapped", swap_experts, _BOTH),
    Miscompile("gate_up_swapped", "gate and up of the experts are swapped", swap_gate_and_up, _BOTH, subtle=True),
    Miscompile("route_scale_lost", "what experts give is not scaled", lose_route_scale, _BOTH, subtle=True),
    Miscompile("heads_regrouped", "query heads use each other's keys", regroup_heads, _BOTH),
    Miscompile("taps_reversed", "filters are applied back to front", reverse_taps, _BOTH),
    Miscompile("bias_off_by_one", "the bias of distance d + 1 is used at d", shift_bias, ("time_speak", "rep_count")),
    Miscompile("tokens_off_by_one", "a token is embedded as the next one", shift_tokens, ("time_speak", "rep_count")),
    Miscompile("audio_stale", "the samples of the tick before are heard", stale_audio, ("barge_in", "cue_speak")),
    Miscompile("video_stale", "the clip before is seen", stale_video, ("cue_speak", "start_stop")),
    Miscompile("pixels_transposed", "pixels are read column by column", transpose_pixels, _BOTH, subtle=True),
    Miscompile("own_voice_unmarked", "it hears itself as a user", lose_self_voice, _BOTH, subtle=True),
    Miscompile("hidden_stale", "the voice is made of the hidden state before", stale_hidden, _BOTH, subtle=True),
    Miscompile("flow_time_stuck", "all steps of the flow are at time 0", stop_flow_time, ("rep_count",), subtle=True),
    Miscompile("overlap_lost", "what two frames of sound have in common is lost", lose_overlap, ("rep_count",)),
)


class _Seeded(Pass):
    """Makes the mistake, as a pass would."""

    def __init__(self, edit: Callable[[Program], int]) -> None:
        super().__init__()
        self.edit = edit

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(program, self.edit(program))


@dataclass(frozen=True)
class _SeededStep(Step):
    edit: Callable[[Program], int] = lambda program: 0

    def build(self, where: str = "pipeline") -> Pass:
        return _Seeded(self.edit)


@contextmanager
def _before_lowering(edit: Callable[[Program], int]) -> Iterator[None]:
    """Programs are lowered as `edit` leaves them."""
    lower = CpuTarget.emit

    def emit(self: CpuTarget, program: Program, *rest: Any) -> Any:
        wrong = program.clone()
        assert edit(wrong)
        return lower(self, wrong, *rest)

    with mock.patch.object(CpuTarget, "emit", emit):
        yield


@contextmanager
def traced_once() -> Iterator[None]:
    """Each checkpoint is traced once: that takes longer than all that follows, and is the same for all mistakes."""
    kept: dict[Path, Program] = {}
    load = compiler.load_program

    def load_once(source: Any, overrides: Any = None) -> Program:
        if source.folder not in kept:
            kept[source.folder] = load(source, overrides)
        return kept[source.folder].clone()

    with mock.patch.object(compiler, "load_program", load_once):
        yield


def compile_wrong(made: Miscompile, checkpoint: Path, out: Path, precision: str = "fp32") -> None:
    """A CPU package of the checkpoint with this mistake in it."""
    right = load_pipeline("cpu")
    if made.lowered:
        with _before_lowering(made.edit):
            tmlc.compile(checkpoint, out, precision=precision, pipeline=right)
        return
    step = _SeededStep(f"seeded.{made.name}", expect_matches=">=1", edit=made.edit)
    tmlc.compile(checkpoint, out, precision=precision, pipeline=Pipeline(right.name, (step, *right.steps)))


# What the suite says.


Scores = dict[str, tuple[float, float, float]]
"""score → (figure, low, high)."""


def scores(package: Path, task: str, episodes: int) -> Scores:
    """Of the task, and of the words as they are heard in it."""
    with tmlc.load(package, sessions=16) as engine:
        view = evaluate(engine, [task], episodes, seed=0)
    found = {task: (view["tasks"][task]["score"], *view["tasks"][task]["interval"])}
    if view["words"]["of"]:
        found["words"] = (view["words"]["rate"], *view["words"]["interval"])
    return found


def dropped(good: Scores, wrong: Scores) -> list[str]:
    """The scores whose interval lies below that of the good package."""
    return [name for name, (_, _, high) in wrong.items() if name in good and high < good[name][1]]


def tell(checkpoint: Path, chosen: Sequence[Miscompile], episodes: int) -> Iterator[tuple[Miscompile, str, bool]]:
    """For each mistake: its scores beside those of the good package, fallen ones in bold, and whether one fell. Its
    tasks are played until one tells."""
    with tempfile.TemporaryDirectory() as folder, traced_once():
        right, package = Path(folder) / "right.tmlc", Path(folder) / "wrong.tmlc"
        tmlc.compile(checkpoint, right, precision="fp32")
        good: dict[str, Scores] = {}
        for made in chosen:
            compile_wrong(made, checkpoint, package)
            cells: list[str] = []
            fell: list[str] = []
            for task in made.tasks:
                good[task] = good.get(task) or scores(right, task, episodes)
                wrong = scores(package, task, episodes)
                fell = dropped(good[task], wrong)
                for name in (name for name in wrong if name in good[task]):
                    cell = f"{name} {100 * good[task][name][0]:.0f} → {100 * wrong[name][0]:.0f} %"
                    cells.append(f"**{cell}**" if name in fell else cell)
                if fell:
                    break
            yield made, ", ".join(cells), bool(fell)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a row for each mistake; 1 when there is one that no score tells and that is not subtle."""
    parser = argparse.ArgumentParser(description="which scores of tmlc eval tell a wrong compilation")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--episodes", type=int, default=24, help="of each task that is played")
    parser.add_argument("--only", metavar="A,B,…", help="only these mistakes")
    parser.add_argument("--tasks", metavar="A,B,…", help="play these, not those that tell a mistake best")
    options = parser.parse_args(arguments)
    only = {made.name for made in MISCOMPILES} if options.only is None else set(options.only.split(","))
    chosen = [made for made in MISCOMPILES if made.name in only]
    if len(chosen) < len(only):
        parser.error(f"--only names no mistake; choose from {', '.join(made.name for made in MISCOMPILES)}")
    if options.tasks is not None:
        chosen = [dataclasses.replace(made, tasks=tuple(chosen_tasks(options.tasks))) for made in chosen]
    missed = []
    print("| mistake | what goes wrong | scores, good → wrong |\n| --- | --- | --- |", flush=True)
    for made, cells, told in tell(options.checkpoint, chosen, options.episodes):
        missed += [] if told else [made.name]
        print(f"| `{made.name}` | {made.about} | {cells} |", flush=True)
    print(f"\n{len(chosen) - len(missed)} of {len(chosen)} are told; not told: {', '.join(missed) or 'none'}")
    return int(any(made.name in missed and not made.subtle for made in chosen))


if __name__ == "__main__":
    sys.exit(main())
