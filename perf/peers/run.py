"""`make peers`: tmlc beside the engines that people would pick instead, on one checkpoint, in interleaved rounds.

Makes what is missing (prepare.py), asks every engine for the same logits, and then lets them take turns: in each round
every engine does a few micro-turns while all others sleep, and bandwidth and products are measured in the same round.
Only ratios inside a round are compared. Writes perf/results/peers-<machine>.json and prints it as the tables of
docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
from floor import floor_of
from prepare import HERE, Contender, Places, contenders, prepare, routing

from tmlc.report.machine import machine, slug

RESULTS = HERE.parent / "results"
START_SECONDS, REQUEST_SECONDS = 900, 300
SITTINGS = (("llama.cpp",), ("transformers", "torch.compile", "onnxruntime", "openvino"))
"""Which peers are loaded together, each time with tmlc: all at once, their copies of the model push mapped weights out
of the memory of a machine of 24 GiB."""


class Worker:
    """A contender's process. `error` says why it can answer nothing, if so."""

    def __init__(self, python: Path, script: str, settings: dict[str, Any]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        self._process = subprocess.Popen(
            [str(python), script, json.dumps(settings)],
            cwd=HERE, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self.error = ""
        self.facts: dict[str, Any] = self._answer().get("facts", {})

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            lines = [text.strip() for text in self._log.read().splitlines() if text.strip()]
            self.error = f"exit status {self._process.returncode}: {' / '.join(lines[-2:])[-400:]}"
            return {}
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            self.error = answer["error"]
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process; it has nothing to save."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def reference(places: Places) -> np.ndarray:
    """The logits of transformers in float32, which every contender is held against."""
    path = places["reference.npy"]
    if not path.exists():
        report.say("making reference.npy: transformers in float32")
        settings = {"model": str(places["checkpoint"]), "compile": False, "dtype": "float32", "threads": os.cpu_count()}
        worker = Worker(places.peers, "transformers_peer.py", settings)
        if not worker.error:
            worker.ask(do="logits", to=str(path))
        if worker.error:
            raise SystemExit(f"no reference: {worker.error}")
        worker.close()
    return np.load(path)


def compare(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """How far logits [n, vocab] are from the reference, and how often the most likely token is the same."""
    flat, want = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    return {
        "relative_error": float(np.linalg.norm(flat - want) / np.linalg.norm(want)),
        "cosine": float(flat @ want / (np.linalg.norm(flat) * np.linalg.norm(want))),
        "same_top": int((found.argmax(1) == wanted.argmax(1)).sum()),
        "of": len(wanted),
    }


def start(places: Places, chosen: list[Contender], threads: int, failed: dict[str, str]) -> dict[str, Any]:
    """A row for every contender, with its worker where it runs and the reason where it does not."""
    wanted, rows = reference(places), {}
    for c in chosen:
        row: dict[str, Any] = {"engine": c.engine, "precision": c.precision, "append_ms": [], "decode_ms": []}
        rows[c.name] = row
        relative = str(c.model.relative_to(places.base))
        if relative in failed:
            row["error"] = failed[relative]
            continue
        report.say(f"starting {c.name}, {threads} thread(s)")
        worker = Worker(c.python, c.script, {**c.settings, "threads": threads})
        row["facts"] = worker.facts
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "logits.npy"
            if not worker.error:
                worker.ask(do="logits", to=str(to))
            if worker.error:
                row["error"] = worker.error
                worker.close()
                continue
            row["logits"] = compare(np.load(to), wanted)
        row["worker"] = worker
    return rows


def measure(
    places: Places, chosen: list[Contender], threads: int, failed: dict[str, str], options: argparse.Namespace
) -> dict[str, Any]:
    """Interleaved rounds with one number of threads."""
    rows = start(places, chosen, threads, failed)
    reader = Worker(places.tmlc, "bandwidth_peer.py", {"threads": threads})
    if reader.error:
        raise SystemExit(f"the read bandwidth cannot be measured: {reader.error}")
    bandwidth: list[float] = []
    rates: dict[str, list[float]] = {}
    running = [name for name, row in rows.items() if "worker" in row]
    try:
        for index in range(options.rounds):
            report.say(f"{threads} thread(s), round {index + 1} of {options.rounds}")
            ceilings = reader.ask(do="read")
            bandwidth.append(ceilings["bytes_per_second"])
            for kind, rate in ceilings["multiply_adds_per_second"].items():
                rates.setdefault(kind, []).append(rate)
            shift = index % max(len(running), 1)
            for name in running[shift:] + running[:shift]:
                time.sleep(0.02)  # the threads of the one before are asleep by then
                answer = rows[name]["worker"].ask(do="turns", count=options.turns)
                for part in ("append_ms", "decode_ms"):
                    rows[name][part].append(float(np.median(answer[part])))
    finally:
        reader.close()
        for row in rows.values():
            if "worker" in row:
                row.pop("worker").close()
    ceilings = {"bandwidth": bandwidth, "multiply_adds": rates}
    return {"threads": threads, **ceilings, "rows": rows, "load_average": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--peers", type=Path, required=True, help="the interpreter that has requirements.txt")
    parser.add_argument("--export", type=Path, required=True, help="the interpreter that has requirements-export.txt")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turns", type=int, default=3, help="micro-turns a round; the median counts")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENGINE", help="tmlc, llama.cpp, transformers, …")
    parser.add_argument("--enforce", action="store_true", help="exit code 1 when a target is missed")
    parser.add_argument("--print", action="store_true", dest="show", help="print what was recorded, measure nothing")
    options = parser.parse_args()
    out = RESULTS / f"peers-{slug()}.json"
    if options.show:
        print(report.markdown(json.loads(out.read_text(encoding="utf-8"))))
        return
    places = Places(options.base.absolute(), Path(sys.executable), options.peers.absolute(), options.export.absolute())
    failed = prepare(places, report.say)
    chosen = [c for c in contenders(places) if not options.only or c.engine in options.only]
    touched = routing(places)
    floors = {p: floor_of(places[f"{p}.tmlc"], p, touched).to_json() for p in ("bf16", "int8", "int4")}
    body: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "routing": touched,
        "floor_bytes": floors,
        "runs": [
            measure(places, [c for c in chosen if c.engine in ("tmlc", *peers)], threads, failed, options)
            for threads in options.threads
            for peers in SITTINGS
            if not options.only or set(peers) & set(options.only) or peers is SITTINGS[0]
        ],
    }
    body["targets"] = report.targets(body)
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(report.markdown(body))
    if options.enforce and not all(target["met"] for target in body["targets"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
