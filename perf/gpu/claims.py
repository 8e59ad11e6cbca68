"""What was found beside what is wanted of the target: one line each, told from the results alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobs import PEERS, Job, exact
from results import Results

#: Whose times are judged: nano's weights fit into a cache, codes have no target.
FAST = ("small bf16", "small fp8", "small bf16+overlap", "small fp8+overlap")
MOST_BEYOND = 0.05  # part of the positions whose logits may differ by more than the tolerance: rows of other experts
PRODUCTS = ("linear_kernel", "moe_gate_up_kernel", "moe_down_kernel", "moe_down_sum_kernel")


def claims(results: Results) -> list[dict[str, Any]]:
    """Each as {job, claim, value, target, met}; `met` is None for a figure that stands for itself. What was not
    measured is left out."""
    found = []
    for job in results.body["steps"]:
        if not job.endswith(f" {PEERS}"):
            for claim, value, target, met in _engine(results, job):
                own = job in FAST or not target.startswith("at least")
                found.append({"job": job, "claim": claim, "value": value, "target": target if own else "",
                              "met": met if own else None})  # fmt: skip
    return found


Row = tuple[str, Any, str, bool | None]


def _engine(results: Results, job: str) -> Iterator[Row]:
    def get(step: str) -> dict[str, Any] | None:
        return results.get(job, step)

    if row := get("build"):
        yield "variants that spill", row["spilled"], "0", row["spilled"] == 0
    if row := get("golden"):
        yield "golden calls within their tolerance", row["passed"], "all", row["passed"]
    if row := get("bits"):
        yield "the same bits alone, in company and cut otherwise", row["passed"], "all", row["passed"]
    named = Job.parse(job)
    if named.overlap:
        yield from _beside(results, job, named.plain.name, "overlap")
    if named.without:
        left = ", ".join(named.without)
        yield from _beside(results, named.whole.name, job, left)
    for step, what in (("cpu", "the CPU engine"), ("reference", "float64")):
        if row := get(step):
            met = row["finite"] and row["positions_beyond"] <= MOST_BEYOND
            target = f"at most {MOST_BEYOND} of the positions beyond {row['tolerance']} of the largest"
            judged = step == "cpu" and row["cpu_precision"] == named.precision
            yield f"logits and {what}: positions beyond", row["positions_beyond"], target, met if judged else None
    if row := get("kernels"):
        yield from _products(row["rows"])
        yield from _against_torch(results, job, row["rows"])
    if graph := _decode(results, job):
        yield "decode of one position, part of its floor", graph["of_floor"], "", None
        if graph["kernels_alone"]:
            value = graph["seconds"] / graph["kernels_alone"]
            yield "graph of decode over its kernels by themselves", value, "at most 1.1", value <= 1.1
    if (row := get("chains")) and row["tick_ms"]:
        for kind, floor in row["tick_floor_ms"].items():
            value = floor / row["tick_ms"][kind]
            yield f"a {kind} tick, part of its floor", value, "at least 0.5", value >= 0.5
        alone = [chain for chain in row["rows"] if chain["sessions"] == 1]
        yield "host's gap of a graph, microseconds", 1e6 * max(chain["host_gap_seconds"] for chain in alone), "", None
        # Beside what `tmlc plan` takes a launch to cost (docs/cost-model.md); all that keeps kernels from their floor.
        beyond = sum(chain["seconds"] * (1 - chain["of_floor"]) for chain in alone)
        value = 1e6 * beyond / sum(chain["launches"] for chain in alone)
        yield "a launch beyond its weights, microseconds", value, "", None
    if row := get("ticks"):
        whole = row["ticks"] >= 10_000
        yield "ticks of one session", row["ticks"], "10000", whole
        yield "device memory grown, bytes", row["device_bytes_grown"], "0", whole and row["device_bytes_grown"] <= 0
        yield "host memory grown, bytes", row["host_bytes_grown"], "", None
        yield "last tenth of the ticks over the first", row["last_tenth_over_first"], "", None


def _beside(results: Results, with_it: str, without: str, what: str) -> Iterator[Row]:
    """An engine with and without `what`: whether they must have the same bits and have, and what it buys."""
    one, other = results.get(with_it, "bits"), results.get(without, "bits")
    if one and other and _same_bits(results, with_it, without):
        same = one["digest"] == other["digest"]
        yield f"the same bits with and without {what}", same, "yes", same
    one, other = results.get(with_it, "chains"), results.get(without, "chains")
    if one and other:
        for kind, ms in one["tick_ms"].items():
            yield f"a {kind} tick without {what} over one with", other["tick_ms"][kind] / ms, "", None
    one, other = (_decode(results, job) for job in (with_it, without))
    if one and other:
        yield f"decode of one position without {what} over one with", other["seconds"] / one["seconds"], "", None


def _same_bits(results: Results, with_it: str, without: str) -> bool:
    """Whether the jobs differ in exact passes only, and the others found the same there to rewrite."""
    known = exact()
    if not set(Job.parse(without).without) <= known:
        return False
    found = [(results.get(job, "build") or {}).get("matches", {}) for job in (with_it, without)]
    inexact = [{name: count for name, count in matches.items() if name not in known} for matches in found]
    return inexact[0] == inexact[1]


def _decode(results: Results, job: str) -> dict[str, Any] | None:
    """The graph of `decode` of one session and position."""
    rows: list[dict[str, Any]] = (results.get(job, "graphs") or {"rows": []})["rows"]
    return next((row for row in rows if (row["method"], row["bucket"]) == ("decode", "b1n1")), None)


def _products(rows: list[dict[str, Any]]) -> Iterator[Row]:
    """The products of one position of `decode`, together and the slowest."""
    own = [r for r in rows if (r["method"], r["bucket"]) == ("decode", "b1n1") and r["kernel"] in PRODUCTS]
    for kind in ("moe_", "linear"):
        part = [row for row in own if row["kernel"].startswith(kind)]
        if part:
            # of_floor is bytes over bandwidth over seconds.
            floor = sum(row["count"] * row["of_floor"] * row["seconds"] for row in part)
            value = floor / sum(row["count"] * row["seconds"] for row in part)
            name = {"moe_": "experts", "linear": "linear"}[kind]
            yield f"{name}: kernels of one position, part of their floor", value, "at least 0.7", value >= 0.7


def _against_torch(results: Results, job: str, rows: list[dict[str, Any]]) -> Iterator[Row]:
    peer = results.get(f"{job.rpartition(' ')[0]} {PEERS}", "experts, 1 row")
    own = [r for r in rows if (r["method"], r["bucket"]) == ("decode", "b1n1") and r["kernel"].startswith("moe_")]
    if peer is None or not own:
        return
    seconds = sum(row["seconds"] for row in own)
    for way in ("grouped_mm", "grouped_mm, compiled"):
        for kind in ("eager", "graph"):
            if other := peer.get(way, {}).get(kind):
                value = other / seconds
                judged = " bf16" in job and (way, kind) == ("grouped_mm", "graph")
                target, met = ("at least 1.5", value >= 1.5) if judged else ("", None)
                yield f"PyTorch's {way} ({kind}) over the experts' kernels", value, target, met
