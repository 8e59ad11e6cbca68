"""The model card of a trained checkpoint: what it is, how it was made, and what `tmlc eval` measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import InteractionConfig
from ..modeling import count_parameters
from ..tasks import TASKS, SpeechBank
from ..tasks.words import MODEL_WORDS, TEST_VOICES, TRAINING_VOICES

CARD = """# {name}

A small interaction model that hears, sees, reads, speaks and writes on a clock of {tick} ms. {parameters:,} parameters,
of which {active:,} work at a position. It says {words} words, in one voice. Trained by tmlc from nothing, on synthetic
conversations only; it is made to show that a compile keeps a model's behaviour, not to be talked to about the world.
The weights are under tmlc's own licence, Apache-2.0.

```sh
tmlc compile {name} -o {name}.tmlc
tmlc eval {name}.tmlc
```

## Data

Episodes of {tasks}, drawn afresh for every step (`tmlc.model_zoo.interaction.tasks`).
All speech is synthesised ({voice}): {training} voices of users in training, {test} others in
evaluation, and the model's own. No recording of a person, no text of others.

## Recipe

{recipe}

Losses: weighted cross-entropy of the text head, flow matching of the speech head on log-mel frames, sample error and
spectral distance of the vocoder; two heads that only training has name what is heard, seen and meant.
`docs/training.md` has the rest, what was changed while it ran, and the command.

## Scores

`tmlc eval`, package `{digest}` ({target}, {precision}), {episodes} held-out episodes a task from seed {seed} on, voices
not used in training; 95 % intervals.

| task | score | interval | what is scored |
| --- | --- | --- | --- |
{rows}

{speech}

## Limits

- It knows the words and the situations of its tasks, in voices of one synthesiser. Other speech it was not taught.
- Instructions are typed or said in the forms of the tasks; a paraphrase is not understood.
- Long conversations: it was trained on episodes of up to {limit} positions, from the start of a session.
"""


def card(config: InteractionConfig, scores: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of the card.

    Args:
        config: of the checkpoint.
        scores: what `tmlc eval --json` printed for a package of it.
        stages: stage → its settings as its state has them (`Stage.describe`), with "done" and "seconds".
    """
    total, active = count_parameters(config)
    rows = [
        f"| {name} | {100 * task['score']:.1f} % | {_span(task['interval'])} | {TASKS[name].about} |"
        for name, task in scores["tasks"].items()
    ]
    words, clicks = scores["words"], scores["clicks"]
    speech = f"Words that an independent recogniser hears as they were written: {_rate(words)}."
    together = "stand out" if clicks["stand_out"] else "do not stand out"
    speech += f" Clicks at edges of ticks: {clicks['clicks']} of {clicks['edges']}; all edges together {together}."
    recipe = [
        f"- {name}: {made['done']:,} steps of {made['size']} {'episodes' if name == 'model' else 'pieces'}, "
        f"{made['seconds'] / 3600:.1f} h, AdamW at {made['rate']:g}, seed {made['seed']}, weights averaged "
        f"({made['average']:g})"
        for name, made in stages.items()
    ]
    return CARD.format(
        name=config.name, tick=config.tick_config.duration_ms, parameters=total, active=active, words=len(MODEL_WORDS),
        tasks=", ".join(f"`{name}`" for name in stages["model"]["mixture"]["tasks"]),
        voice=SpeechBank.load().synthesiser, training=len(TRAINING_VOICES), test=len(TEST_VOICES),
        recipe="\n".join(recipe), digest=str(scores["digest"])[:12], target=scores["target"],
        precision=scores["precision"], episodes=max(task["episodes"] for task in scores["tasks"].values()),
        seed=scores["seed"], rows="\n".join(rows), speech=speech, limit=stages["model"]["mixture"]["limit"],
    )  # fmt: skip


def _span(interval: list[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f} %"


def _rate(rate: Mapping[str, Any]) -> str:
    if rate["rate"] is None:
        return "none was written"
    return f"{100 * rate['rate']:.1f} % of {rate['of']}"
