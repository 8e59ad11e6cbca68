"""Turn latency as the server sees it: from the end of the user's voice to the first voiced output that is handed out.

Voice is known by the tick. The end of the user's voice lies somewhere within the last tick that had any; the beginning
of that tick's input is taken for it, so what is measured is an upper bound, too long by at most one tick.
"""

from __future__ import annotations

from tmlc.runtimes.core.live import Published


class TurnWatch:
    """The turns of one session.

    A turn is: the user was heard, then was not, and the model, silent before, was heard. A model that was speaking
    already before the user's last tick with voice answers nothing; nor is there a turn when the user goes on before it
    answers.

    Args:
        period: seconds of a tick.
    """

    def __init__(self, period: float) -> None:
        self._period = period
        self._user = self._model = False
        self._voice: tuple[int, float] | None = None  # last tick with the user's voice, and when its input began
        self._onset: int | None = None  # tick at which the voice of the model began that it is speaking with
        self._handed: tuple[int, float] | None = None  # the onset's tick, and when it was handed out
        self._asked: float | None = None  # the end of the user's voice, while the model has not answered
        self._answer: int | None = None  # the tick that answers, until it is handed out

    def tick(self, out: Published) -> float | None:
        """One more tick. Returns the seconds of a turn that this tick shows to be one whose answer was handed out."""
        index, found = out.output.index, None
        if out.model_speaking and not self._model:
            self._onset = index
        elif not out.model_speaking:
            self._onset = None
        if out.user_speaking:
            self._voice = (index, out.due - self._period)
            self._asked = self._answer = None
        elif self._user and self._voice is not None:
            self._asked = self._voice[1]
        if self._asked is not None and self._answer is None and self._onset is not None and self._voice is not None:
            if self._onset >= self._voice[0]:
                self._answer = self._onset
                if self._handed is not None and self._handed[0] == self._answer:
                    found = self._close(self._handed[1])
            else:
                self._asked = None
        self._user, self._model = out.user_speaking, out.model_speaking
        return found

    def handed_out(self, tick: int, when: float) -> float | None:
        """The audio of a tick was handed out at `when`. Returns the seconds of the turn that it answers, if it does."""
        if self._answer is not None and tick == self._answer:
            return self._close(when)
        if self._onset is not None and tick == self._onset:
            self._handed = (tick, when)
        return None

    def _close(self, when: float) -> float | None:
        asked, self._asked, self._answer = self._asked, None, None
        return None if asked is None else max(0.0, when - asked)
