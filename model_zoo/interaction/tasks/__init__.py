"""Synthetic conversations with exact labels: what the reference model is trained on and evaluated with.

    bank = SpeechBank.load()
    episode = TASKS["turn_taking"].episode(seed=7, split="train", bank=bank)

Numpy only. Reading the recorded words needs soundfile (extra `media`); no synthesiser is needed. docs/eval.md
describes the tasks and how they are scored.
"""

from . import asides, asked, delegate, spoken
from .bank import SpeechBank
from .episode import Episode, Task, TokenIds, Utterance

_ALL = (*spoken.TASKS, *asides.TASKS, *asked.TASKS, *delegate.TASKS)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}

__all__ = ["TASKS", "Episode", "SpeechBank", "Task", "TokenIds", "Utterance"]
