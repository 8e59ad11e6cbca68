"""What the peers need before they can run: the checkpoint, and its form for each of them. Made once and kept."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONTEXT = 4096


@dataclass(frozen=True)
class Places:
    """Where things are: the folder of what is made, and the three interpreters."""

    base: Path
    tmlc: Path
    peers: Path
    export: Path

    def __getitem__(self, name: str) -> Path:
        return self.base / name


@dataclass(frozen=True)
class Contender:
    """One engine in one precision: the worker that runs it and what it is told.

    Attributes:
        name: as the tables have it.
        engine: whose it is; `precision`: bits of its weights, "bf16", "int8" or "int4", or what it uses in their place.
        script, python: the worker's file, and the interpreter for it.
        settings: without `threads`.
        model: the file that it loads.
    """

    name: str
    engine: str
    precision: str
    script: str
    python: Path
    settings: Mapping[str, Any]
    model: Path


def contenders(places: Places) -> list[Contender]:
    """Everything that is measured, each with the file that `prepare` makes for it."""
    found: list[Contender] = []

    def add(name: str, engine: str, precision: str, script: str, python: Path, model: str, **settings: Any) -> None:
        path = places[model]
        found.append(Contender(name, engine, precision, script, python, {"model": str(path), **settings}, path))

    for precision in ("bf16", "int8", "int4"):
        package = f"{precision}.tmlc"
        ours = (precision, "tmlc_peer.py", places.tmlc, package)
        for huge in (False, True):
            add(f"tmlc {precision}, {'huge pages' if huge else 'mapped'}", "tmlc", *ours, huge_pages=huge)
    for kind, precision in (("BF16", "bf16"), ("Q8_0", "int8"), ("Q4_0", "int4")):
        for flash in (True, False):
            name = f"llama.cpp {kind}, {'flash' if flash else 'plain'} attention"
            add(name, "llama.cpp", precision, "llama_peer.py", places.peers, f"{kind}.gguf", flash=flash)
    for compiled in (False, True):
        name = "transformers torch.compile" if compiled else "transformers eager"
        engine = "torch.compile" if compiled else "transformers"
        settings = {"compile": compiled, "dtype": "bfloat16"}
        add(name, engine, "bf16", "transformers_peer.py", places.peers, "checkpoint", **settings)
    add("ONNX Runtime", "onnxruntime", "fp32", "onnxruntime_peer.py", places.peers, "onnx/model.onnx")
    for form, precision in (("fp16", "bf16"), ("int8", "int8"), ("int4", "int4")):
        model = f"openvino-{form}/openvino_model.xml"
        add(f"OpenVINO {form}", "openvino", precision, "openvino_peer.py", places.peers, model)
    return found


def commands(places: Places) -> dict[str, list[str]]:
    """What makes each file, by the file's name under the folder; in the order in which they must run."""
    peers, export = str(places.peers), str(places.export)
    older = str(places["checkpoint-4"])
    made = {"routing.json": [peers, str(HERE / "checkpoint.py"), str(places.base)]}
    for precision in ("bf16", "int8", "int4"):
        out = places[f"{precision}.tmlc"]
        options = ["--precision", precision, "--context", str(CONTEXT), "--context-policy", "end", "--force"]
        made[out.name] = [
            str(places.tmlc), "-m", "tmlc.cli.main", "compile", str(places["checkpoint"]), "-o", str(out), *options
        ]  # fmt: skip
    for kind in ("BF16", "Q8_0", "Q4_0"):
        out = places[f"{kind}.gguf"]
        made[out.name] = [peers, str(HERE / "gguf_file.py"), str(places["checkpoint"]), str(out), kind]
    task = ["--model", older, "--task", "text-generation-with-past"]
    optimum = [export, "-m", "optimum.commands.optimum_cli", "export"]
    for form in ("fp16", "int8", "int4"):
        extra = ["--sym", "--group-size", "64", "--ratio", "1.0"] if form == "int4" else []
        out = places[f"openvino-{form}"]
        name = f"{out.name}/openvino_model.xml"
        made[name] = [*optimum, "openvino", *task, "--weight-format", form, *extra, str(out)]
    made["onnx/model.onnx"] = [*optimum, "onnx", *task, str(places["onnx"])]
    return made


def prepare(places: Places, say: Any) -> dict[str, str]:
    """Makes what is missing. Returns the last lines of what failed, by file: a peer that cannot read the model is a
    finding and ends nothing; without the checkpoint and tmlc's own packages there is nothing to do."""
    places.base.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMLC_CACHE": "off"}
    for name, command in commands(places).items():
        log = places[name.replace("/", "-") + ".log"]
        if places[name].exists():
            continue
        earlier = places[name.replace("/", "-") + ".failed"]
        if earlier.exists():
            failed[name] = earlier.read_text(encoding="utf-8")
            continue
        say(f"making {name}")
        with log.open("w", encoding="utf-8") as out:
            done = subprocess.run(command, cwd=HERE, env=environment, stdout=out, stderr=out, check=False)
        if done.returncode == 0 and places[name].exists():
            continue
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        failed[name] = " / ".join(lines[-3:])[-600:] or f"exit status {done.returncode}"
        if name == "routing.json" or name.endswith(".tmlc"):
            raise SystemExit(f"cannot make {name}: {failed[name]}\nsee {log}")
        earlier.write_text(failed[name], encoding="utf-8")
    return failed


def routing(places: Places) -> dict[str, float]:
    """Experts touched a layer, counted by checkpoint.py."""
    found: dict[str, float] = json.loads(places["routing.json"].read_text(encoding="utf-8"))
    return found
