"""Prints what user and model did in the demo, side by side, for a person who listens along.

Run `python examples/demo/read_along.py OUT` after `make demo`; OUT holds what `tmlc run` wrote, a folder a scene. The
user's column is from `scenes.yaml` and what was typed, the model's from the timeline: the words that it wrote, at the
time at which it begins to be heard saying them, one tick after they were chosen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TICK = 0.2


def model_words(timeline: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """(seconds, word) of each word that the model wrote; a word begins with a space, and is cut short where it is."""
    found: list[tuple[float, str]] = []
    last = -2
    for line in timeline:
        for letter in line["text"]:
            if letter == " ":
                found.append((line["at"] + TICK, ""))
            elif not found or line["tick"] > last + 1:
                found.append((line["at"] + TICK, letter))
            else:
                found[-1] = (found[-1][0], found[-1][1] + letter)
        last = line["tick"] if line["text"] else last
    return [(at, word) for at, word in found if word]


def rows(name: str, timeline: list[dict[str, Any]]) -> list[tuple[float, str, str]]:
    """(seconds, user, model), in order; one of the two is empty."""
    notes = yaml.safe_load((HERE / "scenes.yaml").read_text(encoding="utf-8"))[name]
    user = [(note["at"], f'"{note["says"]}"' if "says" in note else f"shows {note['shows']}") for note in notes]
    user += [(line["at"], f"types: {line['typed']}") for line in timeline if line["typed"]]
    both = [(at, what, "") for at, what in user] + [(at, "", word) for at, word in model_words(timeline)]
    return sorted(both, key=lambda row: row[0])


def main(out: Path) -> None:
    """Prints every scene."""
    for name in yaml.safe_load((HERE / "scenes.yaml").read_text(encoding="utf-8")):
        lines = (out / name / "timeline.jsonl").read_text(encoding="utf-8").splitlines()
        print(f"\n{name}: {out / name / 'output.wav'} answers {HERE.name}/{name}.wav\n")
        print(f"{'seconds':>8}   {'user':<28}model")
        for at, user, model in rows(name, [json.loads(line) for line in lines]):
            print(f"{at:8.1f}   {user:<28}{model}".rstrip())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/demo/read_along.py OUT")
    main(Path(sys.argv[1]))
