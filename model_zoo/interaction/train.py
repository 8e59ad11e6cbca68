"""Trains the reference interaction model on synthetic conversations: `python -m tmlc.model_zoo.interaction.train RUN`.

RUN is a folder: `vocoder.state` and `model.state` (safetensors) and `log.jsonl`, a line every few steps.
The command goes on from what is there, and the bits of the weights do not depend on where it was interrupted.
docs/training.md has the recipe, what was measured, and the scores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any, TextIO

import torch

from tmlc.errors import CheckpointError, TmlcError, UsageError

from .checkpoint import save_checkpoint
from .config import InteractionConfig
from .modeling import InteractionModel
from .tasks import TASKS, SpeechBank
from .training.card import card
from .training.curves import draw
from .training.stages import BESIDE, Mixture, ModelStage, Settings, VocoderStage
from .training.state import TrainState, read
from .training.workers import Make, Workers

VOCODER = Settings(steps=7000)
MODEL = Settings(steps=8500, size=4, rate=1.2e-3, warm_up=300, weight_decay=0.05)
LOG_EVERY = 10
CHECK_EVERY = 500
SAVE_SECONDS = 120.0


def interaction_nano() -> InteractionConfig:
    """The configuration that is trained: the preset nano with a second global layer, low in the stack (what was asked
    for long ago is then known where the layers above decide; with the last layer alone it would be known too late),
    and with a relative bias that reaches over ten seconds of silence, so that time can be told by distance."""
    raw = InteractionConfig.from_preset("nano").to_dict()
    raw["name"] = "interaction-nano"
    raw["text_config"]["layer_types"] = ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"]
    raw["text_config"]["rel_extent"] = 640
    return InteractionConfig.from_dict(raw)


@dataclass(frozen=True)
class Plan:
    """What a run trains: the settings of both stages, the episodes of the second, and how many processes do it."""

    vocoder: Settings = VOCODER
    model: Settings = MODEL
    mixture: Mixture = field(default_factory=Mixture)
    workers: int = 1

    def stages(self, model: InteractionModel) -> Iterator[Make]:
        """What makes the vocoder's stage, then the model's, which takes the vocoder as it is by then."""
        bank = SpeechBank.load()
        yield partial(VocoderStage, model, self.vocoder, bank)
        yield partial(ModelStage, model, self.model, bank, self.mixture)


def train(
    folder: Path, config: InteractionConfig, plan: Plan, go_on: Callable[[], bool] = lambda: True
) -> InteractionModel:
    """Trains until all steps are done or `go_on`, asked before each step, says no; from where the folder's states are.

    Returns:
        The model with the averaged weights, of as many stages as were begun.

    Raises:
        CheckpointError: the folder holds states of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = InteractionModel.random(config, plan.model.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for make in plan.stages(model.to(device)):
        with closing(Workers(make, plan.workers)) as workers:
            if not run_stage(workers, folder, go_on):
                break
    return model


def run_stage(workers: Workers, folder: Path, go_on: Callable[[], bool]) -> bool:
    """Trains a stage until its steps are done (True) or `go_on` says no (False).

    The state is saved every `SAVE_SECONDS` and at the end; the model holds the averaged weights afterwards. These are
    checked every `CHECK_EVERY` steps.
    """
    stage = workers.stage
    settings, path = stage.settings, folder / f"{stage.name}.state"
    state = TrainState(stage.tensors, settings.weight_decay, settings.betas)
    if path.exists():
        state.load(path)
    saved = begun = monotonic()
    spent, first, positions = state.seconds, state.step, 0.0
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        _write(log, {"stage": stage.name, "step": state.step, "begins": stage.describe()})
        while state.step < settings.steps and go_on():
            parts = workers.step(state.step)
            rate = settings.rate_at(state.step)
            norm = state.update(rate, settings.clip, settings.average)
            parts |= stage.after()
            positions += parts.get("positions", 0.0)
            state.seconds = spent + monotonic() - begun
            if state.step % LOG_EVERY == 0:
                line = {"stage": stage.name, "step": state.step, "seconds": round(state.seconds, 1), "rate": rate}
                _write(log, {**line, "norm": norm, **parts})
            if state.step % CHECK_EVERY == 0:
                with state.averaged():
                    checked = stage.check()
                if checked:
                    _write(log, {"stage": stage.name, "step": state.step, "held_out": checked})
            if monotonic() - saved > SAVE_SECONDS:
                state.save(path, stage.describe())
                saved = monotonic()
    state.save(path, stage.describe())
    if state.step > first:
        took, steps = state.seconds - spent, state.step - first
        print(f"{stage.name}: {steps} steps in {took:.1f} s, {steps / took:.2f} a second", end="")
        print(f", {positions / took:,.0f} positions a second" if positions else "", flush=True)
    state.use_average()
    return state.step >= settings.steps


def export(folder: Path, config: InteractionConfig, out: Path, scores: dict[str, Any] | None = None) -> Path:
    """Writes the averaged weights of a run, as they are now, as a bf16 checkpoint. The run may go on meanwhile.

    Args:
        folder: of the run.
        config: of the run's model.
        out: the folder to make.
        scores: what `tmlc eval --json` printed for these weights; with it, the checkpoint gets a model card, README.md.

    Raises:
        CheckpointError: a stage has no state yet, or one of another model.
        UsageError: `out` holds something.
    """
    model = InteractionModel(config)
    known = dict(model.state_dict(keep_vars=True))
    made: dict[str, dict[str, Any]] = {}
    for name in ("vocoder", "model"):
        header, saved = read(folder / f"{name}.state")
        made[name] = json.loads(header["settings"])
        made[name] |= {"done": int(header["step"]), "seconds": float(header["seconds"])}
        for key, value in saved.items():
            kind, _, tensor = key.partition(".")
            if kind == "average" and not tensor.startswith(BESIDE):
                if tensor not in known or known[tensor].shape != value.shape:
                    raise CheckpointError(f"{tensor} is not of this model", where=str(folder), fix="name another run")
                known[tensor].data.copy_(value)
    save_checkpoint(model, out, "bfloat16")
    if scores is not None:
        (out / "README.md").write_text(card(config, scores, made), encoding="utf-8")
    return out


def _write(log: TextIO, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=log, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tmlc.model_zoo.interaction.train", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of the run; it is made, or gone on from")
    parser.add_argument("--tasks", default=",".join(TASKS), help="names, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocoder-steps", type=int, default=VOCODER.steps)
    parser.add_argument("--steps", type=int, default=MODEL.steps, help="of everything but the vocoder")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop (and save) after so many")
    parser.add_argument(
        "--workers", type=int, default=1 if torch.cuda.is_available() else max(1, min(2, os.cpu_count() or 1)),
        help="processes that share each batch out (its bits depend on how many); one on a GPU, else two",
    )  # fmt: skip
    parser.add_argument("--curves", action="store_true", help="only draw the curves of the log, as RUN/curves.png")
    parser.add_argument("--export", type=Path, metavar="OUT", help="only write the weights so far, as a checkpoint")
    parser.add_argument("--scores", type=Path, metavar="JSON", help="of `tmlc eval --json`: export with a model card")
    options = parser.parse_args(arguments)
    tasks = options.tasks.split(",")
    try:
        if unknown := [name for name in tasks if name not in TASKS]:
            raise UsageError(f"unknown task {unknown[0]!r}", fix=f"choose of: {', '.join(TASKS)}")
        if options.workers < 1 or any(settings.size % options.workers for settings in (VOCODER, MODEL)):
            sizes = f"{VOCODER.size} and {MODEL.size}"
            raise UsageError(f"{options.workers} workers", where="--workers", fix=f"a divisor of the batches, {sizes}")
        if options.curves:
            draw(options.run / "log.jsonl", options.run / "curves.png")
        elif options.export:
            scores = json.loads(options.scores.read_text(encoding="utf-8")) if options.scores else None
            export(options.run, interaction_nano(), options.export, scores)
        else:
            plan = Plan(
                replace(VOCODER, seed=options.seed, steps=options.vocoder_steps),
                replace(MODEL, seed=options.seed, steps=options.steps),
                Mixture(tuple(tasks)),
                options.workers,
            )
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
            stopped = Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stopped.set())
            deadline = monotonic() + 60.0 * options.minutes
            train(options.run, interaction_nano(), plan, lambda: not stopped.is_set() and monotonic() < deadline)
    except TmlcError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
