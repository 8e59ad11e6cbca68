"""A pipeline: an ordered list of passes with settings, as a strict YAML file or picked on the command line."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tmlc.errors import PipelineError, reason, shown
from tmlc.pipeline.pass_base import Pass, PassResult
from tmlc.pipeline.registry import get_pass
from tmlc.yaml_text import YamlFault, parse_yaml

_COMPARE = {"==": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_EXPECTATION = re.compile(r"^(==|>=|<=|>|<)?\s*(\d+)$")
_STEP_KEYS = ("pass", "config", "expect_matches", "level")
LEVELS = ("O0", "O1", "O2")


@dataclass(frozen=True)
class Step:
    """One entry of a pipeline.

    `expect_matches` is a comparison with the number of matches (`">=1"`, `"==12"`, `3`) or `"all"`: no near miss, every
    place the pass looked at was rewritten. None expects nothing. `level`: the step belongs to the presets from O<level>
    on (0: the engine cannot do without it; 1: it leaves out work, and changes no sum; 2: everything that pays).
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    expect_matches: str | None = None
    level: int = 0

    def build(self, where: str = "pipeline") -> Pass:
        """The pass with its settings.

        Raises:
            PipelineError: no such pass, an unknown setting, or a value of the wrong type.
        """
        cls = get_pass(self.name)
        try:
            return cls(cls.Config(**self.config))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            known = list(cls.Config.model_fields)
            if first["type"] == "extra_forbidden":
                close = difflib.get_close_matches(key, known, n=1)
                fix = f"did you mean {close[0]}?" if close else f"its settings: {', '.join(known) or 'none'}"
                raise PipelineError(f"{self.name} has no setting {shown(key)}", where=where, fix=fix) from None
            message = first["msg"][:1].lower() + first["msg"][1:]
            raise PipelineError(
                f"{self.name}: setting {key!r} is {shown(first['input'])}: {message}",
                where=where,
                fix=f"its settings: {', '.join(known)}",
            ) from None

    def check_matches(self, result: PassResult) -> None:
        """Raises PipelineError when the result is not what `expect_matches` says."""
        expected = self.expect_matches
        if expected is None:
            return
        why = f"; first near miss: {result.near_misses[0]}" if result.near_misses else ""
        if expected == "all":
            if not result.near_misses:
                return
            what = f"matched {result.matches} and missed {len(result.near_misses)}, expected all{why}"
        else:
            sign, number = _EXPECTATION.match(expected).groups()  # type: ignore[union-attr]
            if _COMPARE[sign or "=="](result.matches, int(number)):
                return
            what = f"matched {result.matches} times, expected {expected}{why}"
        raise PipelineError(
            f"{self.name} {what}",
            where="expect_matches",
            fix="the model is not what this pipeline was written for: change the expectation or --disable the pass",
        )


@dataclass(frozen=True)
class Pipeline:
    """An ordered list of steps; a pass may repeat."""

    name: str
    steps: tuple[Step, ...]

    @staticmethod
    def parse(text: str, name: str) -> Pipeline:
        """Reads the YAML form: a list of `{pass, config?, expect_matches?}`.

        Raises:
            PipelineError: not YAML, not a list, unknown keys, an unknown pass or setting; all checked here, before any
                pass runs.
        """
        try:
            raw = parse_yaml(text)
        except YamlFault as error:
            fix = "correct the pipeline file"
            raise PipelineError(f"not YAML: {error.what}", where=error.within(name), fix=fix) from None
        if not isinstance(raw, list) or not raw:
            raise PipelineError(
                "a pipeline is a list of passes",
                where=name,
                fix="write `- pass: canonicalize.dead_code`, one entry per pass",
            )
        return Pipeline(name, tuple(_parse_step(entry, f"{name}, entry {i}") for i, entry in enumerate(raw, 1)))

    @staticmethod
    def of(passes: Iterable[str], name: str = "--passes") -> Pipeline:
        """A pipeline of named passes with default settings."""
        steps = tuple(Step(p.strip()) for p in passes if p.strip())
        for step in steps:
            step.build(name)
        return Pipeline(name, steps)

    def disable(self, names: Iterable[str]) -> Pipeline:
        """The same without these passes. Raises PipelineError for a pass that it does not contain."""
        unwanted = set(names)
        self._must_contain(unwanted, "--disable")
        return replace(self, steps=tuple(s for s in self.steps if s.name not in unwanted))

    def stop_after(self, name: str) -> Pipeline:
        """The same up to and including the last step of this name. Raises PipelineError when there is none."""
        self._must_contain({name}, "--stop-after")
        last = max(i for i, s in enumerate(self.steps) if s.name == name)
        return replace(self, steps=self.steps[: last + 1])

    def up_to(self, level: int) -> Pipeline:
        """The steps of this level and the ones below it."""
        return replace(self, steps=tuple(s for s in self.steps if s.level <= level))

    def before(self, name: str, added: str) -> Pipeline:
        """The same with a step more, before the step `name`.

        Raises:
            PipelineError: there is no step `name`, or no pass `added`.
        """
        place = next((number for number, step in enumerate(self.steps) if step.name == name), None)
        if place is None:
            fix = f"it has: {', '.join(step.name for step in self.steps)}"
            raise PipelineError(f"there is no step {name}", where=self.name, fix=fix)
        step = Step(added)
        step.build(self.name)
        return replace(self, steps=(*self.steps[:place], step, *self.steps[place:]))

    def configure(self, name: str, **settings: Any) -> Pipeline:
        """The same with settings of every step of this name overridden (None leaves a setting as it is)."""
        chosen = {k: v for k, v in settings.items() if v is not None}
        steps = tuple(replace(s, config={**s.config, **chosen}) if s.name == name else s for s in self.steps)
        for step in steps:
            if step.name == name:
                step.build(self.name)
        return replace(self, steps=steps)

    def to_yaml(self) -> str:
        """The YAML form; `parse` reads it back."""
        entries = []
        for step in self.steps:
            entry: dict[str, Any] = {"pass": step.name}
            if step.config:
                entry["config"] = step.config
            if step.expect_matches is not None:
                entry["expect_matches"] = step.expect_matches
            if step.level:
                entry["level"] = step.level
            entries.append(entry)
        return yaml.safe_dump(entries, sort_keys=False)

    def _must_contain(self, names: set[str], option: str) -> None:
        absent = sorted(names - {s.name for s in self.steps})
        if absent:
            here = ", ".join(dict.fromkeys(s.name for s in self.steps))
            raise PipelineError(f"the pipeline has no pass {absent[0]!r}", where=option, fix=f"it has: {here}")


def _parse_step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {"pass": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("pass"), str):
        raise PipelineError("an entry needs `pass: NAME`", where=where, fix="write `- pass: canonicalize.dead_code`")
    for key in entry:
        if key not in _STEP_KEYS:
            close = difflib.get_close_matches(str(key), _STEP_KEYS, n=1)
            fix = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(_STEP_KEYS)}"
            raise PipelineError(f"unknown key {key!r}", where=where, fix=fix)
    config = entry.get("config")
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise PipelineError(
            f"`config` is {shown(config)}, not a mapping", where=where, fix="write `config: {setting: value}`"
        )
    expected = entry.get("expect_matches")
    if expected is not None:
        if isinstance(expected, bool) or not (expected == "all" or _EXPECTATION.match(str(expected))):
            raise PipelineError(
                f"`expect_matches` is {shown(expected)}",
                where=where,
                fix='write a comparison such as ">=1" or "==12", or "all"',
            )
        expected = str(expected)
    level = entry.get("level", 0)
    if type(level) is not int or not 0 <= level < len(LEVELS):
        raise PipelineError(f"`level` is {shown(level)}", where=where, fix="write 0, 1 or 2: it is part of O0, O1, O2")
    step = Step(entry["pass"], config, expected, level)
    step.build(where)
    return step


def preset_names() -> list[str]:
    """The pipelines that come with tmlc: one for each target, and the levels of the target's own."""
    folder = resources.files("tmlc.pipeline") / "presets"
    targets = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    return [*LEVELS, *targets]


def _family(target: str) -> str:
    """The part of a target's name before its arguments: its preset has this name."""
    return target.partition(":")[0]


def load_pipeline(source: str | Path, target: str = "cpu") -> Pipeline:
    """A pipeline by preset name (`cpu`, or `O1`: the steps of the target's own pipeline up to level 1) or from a YAML
    file.

    Raises:
        PipelineError: neither a preset nor a readable file, or the file is wrong.
    """
    if str(source) in LEVELS:
        whole = load_pipeline(_family(target))
        return replace(whole.up_to(LEVELS.index(str(source))), name=f"preset {source} of {target}")
    if (name := _family(str(source)) if str(source) == target else str(source)) in preset_names():
        text = (resources.files("tmlc.pipeline") / "presets" / f"{name}.yaml").read_text("utf-8")
        return Pipeline.parse(text, f"preset {name}")
    try:
        text = Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(preset_names())
        what = f"{str(source)!r} is neither a preset nor a pipeline file: {reason(error)}"
        raise PipelineError(what, where="pipeline", fix=f"name a YAML file or a preset: {known}") from None
    return Pipeline.parse(text, str(source))
