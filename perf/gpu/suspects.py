"""Which pass is at fault where an engine's results or bits are wrong: engines that leave out one pass each, and one
that leaves out all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from jobs import Job
from results import Results

from tmlc.pipeline.pipeline import load_pipeline

CHECKS = ("golden", "bits")
STEPS = ("build", *CHECKS)


def fails(results: Results, job: str) -> list[str]:
    """The checks of a job that ran and found something wrong, or failed themselves."""
    return [check for check in CHECKS if results.has(job, check) and not _passed(results, job, check)]


def suspects(name: str, matches: Mapping[str, int] | None = None) -> list[str]:
    """Jobs without the passes of level 2: all of them, and each. `matches`: what each pass found to rewrite in the job;
    those that found nothing are none of its suspects."""
    job, steps = Job.parse(name), load_pipeline("triton").steps
    passes = [
        step.name for step in steps
        if step.level == 2 and step.name not in job.without and (matches is None or matches.get(step.name, 0))
    ]  # fmt: skip
    every = [passes, *([left] for left in passes)] if len(passes) > 1 else [passes] * len(passes)
    return [replace(job, without=(*job.without, *left)).name for left in every]


def verdict(results: Results, name: str, tried: list[str]) -> Iterator[str]:
    """What the checks of those jobs say, line by line."""
    failed = fails(results, name)
    if not failed:
        ran = all(results.has(name, check) for check in CHECKS)
        yield f"{name}: " + ("golden and bits pass: nothing to look for" if ran else "not checked yet")
    for check in failed:
        passed = []
        for other in tried:
            left = ", ".join(_left(name, other))
            if not results.has(other, check):
                yield f"{name}: {check} not tried without {left}"
            elif _passed(results, other, check):
                passed.append(other)
                yield f"{name}: {check} PASSES without {left}"
            else:
                yield f"{name}: {check} fails without {left}"
        single = [pass_ for other in passed for pass_ in _left(name, other) if len(_left(name, other)) == 1]
        if single:
            yield f"{name}: {check}: at fault, or what it hands to: {', '.join(single)}"
        elif passed:
            yield f"{name}: {check}: more than one of these passes is at fault"
        elif tried and all(results.has(other, check) for other in tried):
            yield f"{name}: {check}: none of these passes alone is at fault: look at the kernels that all of them use"


def _passed(results: Results, job: str, check: str) -> bool:
    return bool((results.get(job, check) or {"passed": False})["passed"])


def _left(name: str, other: str) -> tuple[str, ...]:
    return Job.parse(other).without[len(Job.parse(name).without) :]
