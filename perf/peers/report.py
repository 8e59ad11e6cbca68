"""The figures of `make peers` as ratios, targets and Markdown tables."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import worker

PRECISIONS = ("bf16", "int8", "int4")
SAME_MODEL = {"fp32": 0.999, "bf16": 0.99, "int8": 0.98, "int4": 0.7}
"""The cosine to float32 logits below which an engine is not running the same model. Rounding flips some choices of
experts, and four bits flip many."""
MICRO_TURN = {"bf16": 1.8, "int8": 3.0, "int4": 2.5}
DECODE = {"bf16": 1.3, "int8": 2.0, "int4": 1.8}
FLOOR_APPEND = {"bf16": 0.75, "int8": 0.65, "int4": 0.60}
FLOOR_DECODE = {"bf16": 0.85, "int8": 0.80, "int4": 0.70}
EAGER = 6.0


def say(what: str) -> None:
    """Progress goes to standard error."""
    print(what, file=sys.stderr, flush=True)


def same_model(row: dict[str, Any]) -> bool:
    return "logits" in row and row["logits"]["cosine"] >= SAME_MODEL[row["precision"]]


def append_of(row: dict[str, Any]) -> np.ndarray:
    return np.array(row["append_ms"])


def decode_of(row: dict[str, Any]) -> np.ndarray:
    """One decoded position."""
    return np.array(row["decode_ms"])


def turn_of(row: dict[str, Any]) -> np.ndarray:
    return append_of(row) + worker.DECODED * decode_of(row)


def fraction(run: dict[str, Any], row: dict[str, Any], part: str, floor_bytes: float) -> np.ndarray:
    """The floor over the time, round by round: what the bytes would take at the bandwidth of that round."""
    return 1e3 * floor_bytes / np.array(run["bandwidth"]) / np.array(row[f"{part}_ms"])


def roofline(run: dict[str, Any], works: list[dict[str, Any]]) -> np.ndarray:
    """Milliseconds, round by round, that no engine can be under: of each op, what takes longer in that round."""
    return sum((np.maximum(*reading_and_multiplying(run, work)) for work in works), np.zeros(len(run["bandwidth"])))


def reading_and_multiplying(run: dict[str, Any], work: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds, round by round, of an op's bytes at the read bandwidth, and of its products at the rate of the
    instruction that multiplies them."""
    rate = np.array(run["multiply_adds"][work["product"]])
    return 1e3 * work["bytes"] / np.array(run["bandwidth"]), 1e3 * work["multiply_adds"] / rate


def find(run: dict[str, Any], engine: str, precision: str) -> dict[str, Any] | None:
    """The engine's row of this precision that is fastest over a micro-turn (llama.cpp has two forms of attention)."""
    rows = [r for r in run["rows"].values() if r["engine"] == engine and r["precision"] == precision and same_model(r)]
    return min(rows, key=lambda r: float(np.median(turn_of(r))), default=None)


def targets(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target that this run can judge: a ratio or a fraction, the least that is wanted, met or not."""
    found: list[dict[str, Any]] = []

    def judge(name: str, threads: int, values: np.ndarray, least: float) -> None:
        low, value, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
        spread = {"quartiles": [low, high], "least": least, "met": value >= least}
        found.append({"name": name, "threads": threads, "value": value, **spread})

    for run in body["runs"]:
        threads = run["threads"]
        for p in PRECISIONS:
            ours, llama = find(run, "tmlc", p), find(run, "llama.cpp", p)
            if ours is None:
                continue
            if llama is not None and threads > 1:
                judge(f"micro-turn, llama.cpp / tmlc, {p}", threads, turn_of(llama) / turn_of(ours), MICRO_TURN[p])
                judge(f"decode, llama.cpp / tmlc, {p}", threads, decode_of(llama) / decode_of(ours), DECODE[p])
            if llama is None and len(body["runs"]) > 1:
                continue  # the floors are judged once
            floors = body["floor_bytes"][p]
            append = fraction(run, ours, "append", floors["append"])
            judge(f"append of {worker.APPENDED}, fraction of the floor, {p}", threads, append, FLOOR_APPEND[p])
            decode = fraction(run, ours, "decode", floors["decode"])
            judge(f"decode, fraction of the floor, {p}", threads, decode, FLOOR_DECODE[p])
        ours, eager = find(run, "tmlc", "bf16"), find(run, "transformers", "bf16")
        if ours is not None and eager is not None and threads > 1:
            judge("micro-turn, transformers eager / tmlc, bf16", threads, turn_of(eager) / turn_of(ours), EAGER)
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def milliseconds(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def percent(values: np.ndarray) -> str:
    return f"{100 * float(np.median(values)):.0f} %"


def run_table(body: dict[str, Any], run: dict[str, Any]) -> str:
    """One row an engine: its times, how many times tmlc's of the same precision, and its fraction of the floor."""
    rows = []
    for name, row in run["rows"].items():
        if "error" in row:
            reason = row["error"].replace("|", "/").replace("\n", " ")
            rows.append([name, f"does not run: {reason}", *[""] * 6])
            continue
        # What stores wider weights than it has to is held against the nearest precision of ours.
        p = row["precision"] if row["precision"] in PRECISIONS else "bf16"
        ours, floors, logits = find(run, "tmlc", p), body["floor_bytes"][p], row["logits"]
        ratio = f"{float(np.median(turn_of(row) / turn_of(ours))):.2f}" if ours is not None else ""
        agreement = f"{logits['relative_error']:.3f}, {logits['same_top']}/{logits['of']}"
        rows.append(
            [
                name,
                milliseconds(turn_of(row)),
                milliseconds(append_of(row)),
                milliseconds(decode_of(row)),
                ratio if same_model(row) else "not the same model",
                percent(fraction(run, row, "append", floors["append"])),
                percent(fraction(run, row, "decode", floors["decode"])),
                agreement,
            ]
        )
    head = ["", "micro-turn, ms", "append, ms", "decode of one, ms", "× tmlc", "floor, append", "floor, decode"]
    return table([*head, "logits: error, same top"], rows)


def roofline_table(body: dict[str, Any], run: dict[str, Any]) -> str:
    """tmlc beside the roofline of each op, where the instruction binds and not the memory."""
    rows = []
    for p in PRECISIONS:
        row, floors = find(run, "tmlc", p), body["floor_bytes"][p]
        if row is None:
            continue
        for part in ("append", "decode"):
            works, taken = floors[f"{part}_work"], np.array(row[f"{part}_ms"])
            least, read = roofline(run, works), 1e3 * floors[part] / np.array(run["bandwidth"])
            both = {work["op"]: reading_and_multiplying(run, work) for work in works}
            bound = [op for op, (reading, multiplying) in both.items() if np.median(multiplying - reading) > 0]
            times = [f"{np.median(t):.2f}" for t in (read, least, taken)]
            rows.append([p, part, *times, percent(read / taken), percent(least / taken), ", ".join(bound) or "none"])
    head = ["", "", "bytes, ms", "roofline, ms", "taken, ms", "of the bytes", "of the roofline", "bound by products"]
    return table(head, rows)


def markdown(body: dict[str, Any]) -> str:
    """All of it, as docs/performance.md has it."""
    box, touched = body["machine"], body["routing"]
    parts = [
        f"{box['cpu']}, {box['cores']} cores, {body['date']}. A micro-turn appends {worker.APPENDED} positions to "
        f"a cache of {worker.CACHED} and decodes {worker.DECODED}. Medians of interleaved rounds, "
        f"quartiles in brackets. The append touches {touched['append']:.1f} of {touched['experts']} experts a layer.",
        table(
            ["bytes that must be read", "append", "decode of one"],
            [[p, *(f"{body['floor_bytes'][p][k] / 1e6:.0f} MB" for k in ("append", "decode"))] for p in PRECISIONS],
        ),
    ]
    for run in body["runs"]:
        low, middle, high = np.percentile(run["bandwidth"], (0, 50, 100)) / 1e9
        parts.append(
            f"**{run['threads']} thread(s)**; read bandwidth {middle:.1f} GB/s ({low:.1f} to {high:.1f}), "
            f"load average at the end {run['load_average']:.1f}"
        )
        parts.append(run_table(body, run))
        rates = ", ".join(f"{kind} {np.median(rate) / 1e9:.0f}" for kind, rate in run["multiply_adds"].items())
        parts.append(f"10⁹ multiply-adds a second with nothing to fetch: {rates}.")
        parts.append(roofline_table(body, run))
    rows = []
    for t in body["targets"]:
        low, high = t["quartiles"]
        value, verdict = f"{t['value']:.2f} ({low:.2f}-{high:.2f})", "met" if t["met"] else "missed"
        rows.append([t["name"], str(t["threads"]), value, f"{t['least']:g}", verdict])
    parts.append(table(["target", "threads", "median (quartiles)", "at least", ""], rows))
    return "\n\n".join(parts)
