"""Delegations that the model asks for: the text between two special tokens of its output."""

from __future__ import annotations

from collections.abc import Sequence

from tmlc.runtimes.background.policies import Marks
from tmlc.runtimes.core.text import Tokenizer

MAX_TASK_TOKENS = 2_048
"""A task may have so many tokens; what a model writes beyond is left out."""


class DelegationReader:
    """Follows the tokens that one session's model has chosen.

    Args:
        tokenizer, marks: of the package. Without the two tokens of a delegation in it, the model cannot delegate, and
            all that it writes is said.

    Attributes:
        inside: is the model writing a task?
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks) -> None:
        self._tokenizer = tokenizer
        self._begin, self._end = tokenizer.special(marks.delegation), tokenizer.special(marks.end_of_delegation)
        self._task: list[int] = []
        self._visible = tokenizer.decoder()
        self.inside = False

    def push(self, tokens: Sequence[int]) -> tuple[str, list[str]]:
        """The text that these tokens say to the user, and the tasks that end among them. A second <delegation> begins
        the task anew."""
        said: list[int] = []
        tasks: list[str] = []
        for token in tokens:
            if token == self._begin and self._end is not None:
                self.inside, self._task = True, []
            elif self.inside and token == self._end:
                text = self._tokenizer.decoder().push(self._task).strip()
                self.inside, self._task = False, []
                if text:
                    tasks.append(text)
            elif not self.inside:
                said.append(token)
            elif len(self._task) < MAX_TASK_TOKENS:
                self._task.append(token)
        return self._visible.push(said), tasks
