"""The words of the tasks, and the voices that say them.

`MODEL_WORDS` is all that the model ever says; users say these and `USER_WORDS`. A user's words have fixed roles, so
that no two tasks ask for different behaviour in the same situation (docs/eval.md has the table).
"""

from __future__ import annotations

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ANSWERS = ("yes", "no", "hello", "okay")
MODEL_WORDS = (*ANSWERS, "stop", "start", "mhm", *NUMBERS)

STORY = ("so", "we", "went", "home", "and", "then")
USER_WORDS = ("say", "please", "count", "ask", "wait", "anna", "uhhuh", *STORY)

SAMPLE_RATE = 16000

MODEL_VOICE = "model"
TRAINING_VOICES = (
    "adam", "bela", "carl", "dora", "emil", "faye", "gus", "hana", "ivan", "june", "kira",
    "liam", "mona", "nils", "olga", "paul", "rosa", "sven", "tina", "udo", "vera", "will",
)  # fmt: skip
TEST_VOICES = ("karl", "lena")
"""Never heard in training. Two of them, so that somebody can talk in the background of the other."""
