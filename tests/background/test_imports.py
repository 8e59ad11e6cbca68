"""What the room brings in: nothing of the compiler, and the packages of its extra only where they are used."""

import json
import subprocess
import sys

HEAVY = ("torch", "triton", "onnx", "openai", "mcp", "PIL", "httpx", "httpx2", "tmlc.ir", "tmlc.passes", "tmlc.emit")
ROOMS = ("session", "config", "endpoint", "mcp_tools", "engine_model", "callable", "client", "rules", "detectors")


def test_the_room_brings_in_neither_the_compiler_nor_its_extra():
    modules = ", ".join(f"tmlc.runtimes.background.{name}" for name in ROOMS)
    code = f"import json, sys, {modules}; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
