"""A whole bench: starts the processes of the load generator, waits for them, and puts what they saw together."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tmlc.bench.client import Visited
from tmlc.bench.dialects import DIALECTS
from tmlc.bench.figures import LATE_MS, of_histograms, slope, summary
from tmlc.bench.plan import Load, Visit, visits
from tmlc.bench.server import Memory, moved, read_metrics
from tmlc.bench.worker import load_dialogues
from tmlc.errors import CheckError, UsageError
from tmlc.processes import python_module

PER_PROCESS = 32
"""Sessions that one process of the load generator holds at most."""
MADE_UP = 8
"""Different dialogues, when they are made up."""
BEFORE_SECONDS = 3.0
"""From the start of the processes to the beginning of the bench: they import and make up their dialogues meanwhile."""
AFTER_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """Where the server is, and how it is spoken to. `metrics` is the URL of its numbers, or None."""

    url: str
    key: str
    model: str
    dialect: str
    metrics: str | None


def run(
    server: Server, load: Load, folder: str | None, processes: int | None, report: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Benches a server; the answer is the report as data.

    Args:
        folder: of labelled recordings; None makes dialogues up.
        processes: of the load generator; None: one for every 32 sessions.
        report: progress: stage, done, total.

    Raises:
        CheckError: a process of the load generator stopped.
        MediaError, UsageError: of dialogues and metrics.
    """
    rate = DIALECTS[server.dialect].rate
    dialogues = load_dialogues(folder, MADE_UP, rate, load.seed)
    coming = visits(load, len(dialogues))
    count = processes or max(1, -(-load.sessions // PER_PROCESS))
    before = read_metrics(server.metrics) if server.metrics is not None else None
    plan = {
        "url": server.url, "key": server.key, "model": server.model, "dialect": server.dialect, "folder": folder,
        "count": MADE_UP, "seed": load.seed, "piece": load.piece / 1000, "zero": time.monotonic() + BEFORE_SECONDS,
    }  # fmt: skip
    parts, memory = [coming[k::count] for k in range(count)], Memory(server.metrics)
    works = [{**plan, "visits": [asdict(visit) for visit in part]} for part in parts if part]
    answers = _work(works, load, memory, report)
    after = read_metrics(server.metrics) if server.metrics is not None else None
    view = _report(
        server, load, coming, dialogues, answers, None if before is None or after is None else (before, after)
    )
    return {**view, "server_memory": slope(memory.samples)}


def _work(
    plans: Sequence[dict[str, Any]], load: Load, memory: Memory, report: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """Runs one process for each plan."""
    running = [
        subprocess.Popen(
            python_module("tmlc.bench.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in plans
    ]
    try:
        for process, plan in zip(running, plans, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(plan).encode())
            process.stdin.close()
            process.stdin = None
        begun, total = time.monotonic(), round(load.seconds + BEFORE_SECONDS)
        answers = []
        for process in running:
            while process.poll() is None:
                passed = time.monotonic() - begun
                if passed > total + AFTER_SECONDS:
                    raise CheckError("the load generator did not end", fix="run it with fewer sessions")
                report("holding sessions", min(total, round(passed)), total)
                memory.look(passed)
                try:
                    out, err = process.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                out, err = process.communicate()
            if process.returncode:
                lines = err.decode("utf-8", "replace").splitlines()
                said = [line for line in lines if line and not line.startswith(" ")][-1:]  # not the advice below it
                what = f"a process of the load generator stopped: {''.join(said)[:200]}"
                raise CheckError(what, fix="correct what it says; where it says nothing, run it with fewer sessions")
            answers.append(json.loads(out))
        return answers
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def _report(
    server: Server, load: Load, coming: Sequence[Visit], dialogues: Sequence[Any], answers: Sequence[dict[str, Any]],
    metrics: tuple[dict[str, float], dict[str, float]] | None,
) -> dict[str, Any]:  # fmt: skip
    seen = {visit["number"]: _visited(visit) for answer in answers for visit in answer["visits"]}
    view = summary([seen[visit.number] for visit in coming], dialogues, [visit.dialogue for visit in coming])
    late = of_histograms(answer["late"] for answer in answers)
    lag = of_histograms(answer["lag"] for answer in answers)
    generator = {
        "processes": len(answers), "cpu_seconds": round(sum(answer["cpu_seconds"] for answer in answers), 3),
        "send_late_ms": late, "loop_lag_ms": lag, "send_blocked_ms": of_histograms(a["blocked"] for a in answers),
        "bottleneck": late["p99"] > LATE_MS or lag["p99"] > LATE_MS,
    }  # fmt: skip
    return {
        "server": {"url": server.url, "dialect": server.dialect, "model": server.model},
        "load": {**load.to_json(), "dialogues": [dialogue.name for dialogue in dialogues]},
        **view,
        "generator": generator,
        "server_metrics": None if metrics is None else moved(*metrics),
    }


def _visited(data: dict[str, Any]) -> Visited:
    return Visited(**{**data, "ticks": [tuple(tick) for tick in data["ticks"]], "errors": Counter(data["errors"])})


def first_model(url: str, key: str) -> str:
    """The first model that the server lists. Raises UsageError: it does not answer, refuses the key, or lists none."""
    import openai

    try:
        listed = openai.OpenAI(api_key=key, base_url=url, max_retries=1, timeout=10).models.list().data
    except openai.OpenAIError as error:
        raise UsageError(
            f"the server does not list its models: {error}",
            where=url,
            fix="check the URL, which ends with /v1, and --key",
        ) from error
    if not listed:
        raise UsageError("the server lists no model", where=url, fix="give --model")
    return listed[0].id
