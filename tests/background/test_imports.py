"""What the room brings in: nothing of the compiler, and the packages of its extra only where they are used."""

import subprocess
import sys


def imported(*modules: str) -> set[str]:
    names = ("torch", "triton", "onnx", "openai", "mcp", "PIL", "httpx", "httpx2", "tmlc.ir", "tmlc.passes", "tmlc.emit")
    code = f"import sys, {', '.join(modules)}; print([n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(words(done.stdout))


def words(text: str) -> list[str]:
    return [word.strip("' ") for word in text.strip().strip("[]").split(",") if word.strip()]


def test_the_room_brings_in_neither_the_compiler_nor_its_extra():
    rooms = ("session", "config", "endpoint", "mcp_tools", "engine_model", "callable", "client", "rules")
    assert imported(*(f"tmlc.runtimes.background.{name}" for name in rooms)) == set()
