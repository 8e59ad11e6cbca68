"""What is in a package or in a checkpoint folder, as data and as tables (`tmlc inspect`)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmlc.errors import PackageError, UsageError
from tmlc.package.fields import AGAIN, is_text
from tmlc.report.layers import layer_tables
from tmlc.report.tables import grid, megabytes, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tmlc.package.reader import Package

PROGRAM = "program.ir"


def describe_package(package: Package) -> dict[str, Any]:
    """Methods, states, passes, memory, op counts and files of an open package, ready for JSON."""
    manifest = package.manifest
    plans = {name: package.json(target.plan) for name, target in manifest.targets.items()}
    ops = {
        target: _count_launches(package, plan)
        if target.partition(":")[0] == "triton"
        else _count_ops(plan, f"{package.path}: {target}")
        for target, plan in plans.items()
    }
    return {
        "kind": "package",
        "digest": package.digest,
        "manifest": manifest.to_json(),
        "op_counts": ops,
        "weights": {
            "tensors": len(package.tensors),
            "bytes": sum(t.nbytes for t in package.tensors.values()),
        },
    }


def _count_ops(plan: Any, where: str) -> dict[str, dict[str, int]]:
    """How often each method calls each op: a plan says it call by call, the signature of ONNX graphs in numbers, a plan
    of TensorRT as layers of each kind. PackageError for a plan that no backend would take either."""
    try:
        if isinstance(plan["methods"], dict):
            counts = {name: Counter(m["operators"]) for name, m in plan["methods"].items()}
        else:
            counts = {
                m["name"]: Counter(m["layers"] if "layers" in m else (call["op"] for call in m["code"]))
                for m in plan["methods"]
            }
        readable = all(
            is_text(name) and all(is_text(op) and type(count) is int for op, count in ops.items())
            for name, ops in counts.items()
        )
    except (KeyError, TypeError, ValueError):
        readable = False
    if not readable:
        raise PackageError("the plan cannot be read", where=where, fix="compile the checkpoint again")
    return {name: dict(ops.most_common()) for name, ops in counts.items()}


def _count_launches(package: Package, plan: Any) -> dict[str, dict[str, int]]:
    """How often each method of a Triton engine launches each kernel, in its smallest bucket and for the package's first
    architecture. PlanError for a plan that the runtime would not take."""
    from tmlc.runtimes.cuda.plan import architectures, code_name, plan_error, read_plan

    sm = next(iter(architectures(plan)), None)
    if sm is None:
        raise plan_error("it lists no architectures", "plan.json")
    engine = read_plan(plan, package.json(code_name(sm)), sm, package.tensors)
    counts = {}
    for name, method in engine.methods.items():
        smallest = min(method.buckets, key=lambda bucket: (bucket.batch, bucket.n))
        counts[name] = Counter(engine.variants[launch.variant].kernel for launch in smallest.launches)
    return {name: dict(ops.most_common()) for name, ops in counts.items()}


def package_tables(view: dict[str, Any], where: Path) -> list[RenderableType]:
    """The tables that a person reads."""
    manifest = view["manifest"]
    head = grid(
        [
            ("package", str(where)),
            ("model", f"{manifest['model']['name']} ({manifest['model']['kind']})"),
            ("digest", f"sha256 {view['digest'][:16]}…"),
            (
                "format",
                f"{manifest['format']['major']}.{manifest['format']['minor']}, needs "
                + (", ".join(manifest["format"]["required_features"]) or "nothing special"),
            ),
            ("made by", ", ".join(f"{name} {version}" for name, version in manifest["producer"].items())),
            ("targets", ", ".join(f"{name} ({t['precision']})" for name, t in manifest["targets"].items())),
            (
                "context",
                "{limit} positions, policy {policy}, {sinks} sinks, appends of up to {max_append}".format(
                    **manifest["context"]
                ),
            ),
            ("tick", _tick_line(manifest["tick"])),
        ]
    )
    memory = table("memory", "what", "bytes", "")
    once = manifest["memory"]
    for name, count, remark in (
        ("weights", once["weight_bytes"], "mapped from the file"),
        ("arena", once["arena_bytes"], "once per engine"),
        ("scratch", once["scratch_bytes"], "once per engine"),
        ("a session", manifest["session_bytes"], "for each session"),
    ):
        memory.add_row(name, megabytes(count), remark)
    methods = table("methods", "method", "inputs", "outputs", "max n", "kernel calls")
    for method in manifest["methods"]:
        calls = [f"{sum(ops[method['name']].values())}" for ops in view["op_counts"].values() if method["name"] in ops]
        methods.add_row(
            method["name"],
            _signatures(method["inputs"]),
            _signatures(method["outputs"]),
            str(method["max_n"]),
            ", ".join(calls),
        )
    states = table("states of a session", "kind", "count", "bytes", "largest")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for state in manifest["states"]:
        kinds.setdefault(state["kind"], []).append(state)
    for kind, members in kinds.items():
        largest = max(members, key=lambda s: s["bytes"])
        states.add_row(
            kind,
            str(len(members)),
            megabytes(sum(s["bytes"] for s in members)),
            f"{largest['name']} {largest['dtype']} {largest['shape']}",
        )
    passes = table("passes", "pass", "matches", "near misses", "ops", "settings")
    for record in manifest["pipeline"]:
        given = record.get("config", {}).items()
        settings = ", ".join(_setting(key, value) for key, value in given if value not in (None, {}, []))
        passes.add_row(
            str(record.get("pass")),
            str(record.get("matches")),
            str(len(record.get("near_misses", []))),
            f"{record.get('ops_before')} → {record.get('ops_after')}",
            settings,
        )
    counts = table("kernel calls by op", "op", *(name for name in view["op_counts"]))
    totals: dict[str, Counter[str]] = {target: Counter() for target in view["op_counts"]}
    for target, by_method in view["op_counts"].items():
        for by_op in by_method.values():
            totals[target].update(by_op)
    for op in sorted(set().union(*totals.values()) if totals else ()):
        counts.add_row(op, *(str(totals[target][op]) for target in totals))
    return [head, memory, methods, states, passes, *layer_tables(manifest["pipeline"]), counts]


def method_ir(package: Package, method: str) -> str:
    """The text form of one method of the program that the engine was made from ('all': of the whole program).

    Raises:
        UsageError: the package has no such method.
    """
    text = package.read(PROGRAM).decode("utf-8", "surrogateescape")
    if not text.replace("\n", "").isprintable():  # it goes to a terminal
        where = f"{package.path}: {PROGRAM}"
        raise PackageError("the program holds characters that cannot be printed", where=where, fix=AGAIN)
    if method == "all":
        return text
    names = [m.name for m in package.manifest.methods]
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.startswith(f"method {method}("):
            end = next((i for i in range(number + 1, len(lines)) if lines[i].rstrip() == "}"), len(lines) - 1)
            return "".join(lines[number : end + 1])
    raise UsageError(
        f"the package has no method {method!r}", where="--ir", fix=f"its methods: {', '.join(names)}, or all"
    )


def program_text(path: Path) -> str:
    """The program in a package, or in a file that --dump wrote.

    Raises:
        UsageError: it is neither, or a checkpoint.
        PackageError: the package is damaged.
    """
    from tmlc.package.reader import open_package

    if not path.exists() or (path.is_dir() and not (path / "manifest.json").is_file()):
        raise UsageError(
            "no program is there", where=str(path), fix="give a .tmlc package, or a file that tmlc compile --dump wrote"
        )
    if path.suffix == ".ir":
        return path.read_text("utf-8")
    with open_package(path) as package:
        return package.read(PROGRAM).decode("utf-8")


def diff_lines(view: dict[str, Any]) -> list[str]:
    """The difference of two programs (`tmlc.ir.diff.diff_programs`) as a person reads it."""
    lines = []
    for what, before, after in view["changed"]:
        lines += [f"{sign} {what} {text}" for sign, text in (("-", before), ("+", after)) if text]
    for name, method in view["methods"].items():
        counts = ", ".join(f"{op} {then} → {now}" for op, (then, now) in method["ops"].items())
        lines += ["", f"method {name}: {counts or 'the same ops'}", *method["lines"]]
    return lines or ["the programs are the same"]


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Config and tensors of a checkpoint folder (its shards are checked against their headers)."""
    from tmlc.frontend.checkpoint import DTYPES, open_checkpoint

    checkpoint = open_checkpoint(folder)
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": info.dtype,
            "shard": info.shard,
            "bytes": _product(info.shape) * DTYPES[info.dtype][1],
        }
        for name, info in checkpoint.tensors.items()
    }
    return {
        "kind": "checkpoint",
        "model_type": checkpoint.config.get("model_type"),
        "config": checkpoint.config,
        "shards": checkpoint.shards,
        "parameters": sum(_product(t["shape"]) for t in tensors.values()),
        "bytes": sum(t["bytes"] for t in tensors.values()),
        "tensors": tensors,
    }


def checkpoint_tables(view: dict[str, Any], where: Path, all_tensors: bool) -> list[RenderableType]:
    """The tables that a person reads; without `all_tensors`, tensors are summed up by the first part of their
    names.
    """
    head = grid(
        [
            ("checkpoint", str(where)),
            ("model type", str(view["model_type"])),
            ("parameters", f"{view['parameters']:,}"),
            ("bytes", f"{megabytes(view['bytes'])} in {len(view['shards'])} shard(s)"),
        ]
    )
    config = table("config", "key", "value")
    for key, value in view["config"].items():
        text = json.dumps(value, ensure_ascii=False)
        config.add_row(key, text if len(text) <= 400 else f"{text[:400]}… (all of it: --json)")
    if all_tensors:
        tensors = table("tensors", "name", "shape", "dtype", "shard")
        for name, info in view["tensors"].items():
            tensors.add_row(name, " × ".join(map(str, info["shape"])) or "scalar", info["dtype"], info["shard"])
        return [head, config, tensors]
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, info in view["tensors"].items():
        parts = name.split(".")
        groups.setdefault(".".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(info)
    tensors = table("tensors (each one: --tensors)", "group", "tensors", "parameters", "bytes")
    for group, members in groups.items():
        tensors.add_row(
            group,
            str(len(members)),
            f"{sum(_product(m['shape']) for m in members):,}",
            megabytes(sum(m["bytes"] for m in members)),
        )
    return [head, config, tensors]


def _setting(key: str, value: Any) -> str:
    text = f"{key} {value}"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _tick_line(tick: dict[str, Any]) -> str:
    parts = [f"{tick['duration_ms']} ms"]
    if tick["audio_in"]:
        parts.append(f"in: {tick['audio_in']} audio")
    if tick["video_positions"]:
        parts.append(
            f"{tick['video_positions']} video every {tick['video_every']} ticks "
            f"({tick['clip_frames']} frames of {tick['frame_width']}×{tick['frame_height']})"
        )
    if tick["text_in"]:
        parts.append(f"up to {tick['text_in']} text")
    parts.append(f"out: up to {tick['text_out']} text")
    if tick["audio_out"]:
        parts.append(f"{tick['audio_out']} audio ({tick['out_sample_rate']} Hz)")
    return ", ".join(parts)


def _signatures(items: list[dict[str, Any]]) -> str:
    return ", ".join(f"{s['name']} {s['dtype']}[{_rows(s['rows'])}, {s['cols']}]" for s in items)


def _rows(rows: list[int] | tuple[int, int]) -> str:
    a, b = rows
    if a == 0:
        return str(b)
    head = "n" if a == 1 else f"{a}n"
    return head if b == 0 else f"{head}+{b}"


def _product(shape: Any) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
