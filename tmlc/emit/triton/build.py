"""Machine code for many variants: a process for each core, and a cache by variant and tool chain.

The children are this file run as a module (`python -m tmlc.emit.triton.build`): one variant a line, one answer a line.
A caller's script needs no `if __name__ == "__main__"` for that, and nobody's PyTorch is started again in them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import triton

from tmlc.cache.key import DigestMemo, tool_settings
from tmlc.cache.store import cache_folder
from tmlc.errors import EmitError, TmlcError, reason
from tmlc.kernels.triton.launch import Variant
from tmlc.kernels.triton.variants import Compiled, variant_key
from tmlc.processes import python_module

FIGURES = ("entry", "num_warps", "shared", "registers", "spill_bytes", "hidden_params")


@cache
def sources() -> str:
    """Digest of the kernels' sources."""
    import tmlc.kernels.triton

    folder = Path(next(iter(tmlc.kernels.triton.__path__)))
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def toolchain() -> str:
    """Digest of everything that decides a variant's machine code but the variant: kernels, Triton, Python, and what the
    environment tells the tools."""
    told = tool_settings(DigestMemo(None))
    what = f"{sources()} {triton.__version__} {sys.version_info[:3]} {told}"
    return hashlib.sha256(what.encode()).hexdigest()


def default_jobs() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_variants(
    variants: Sequence[Variant],
    on_done: Callable[[int, int], None] = lambda done, total: None,
    jobs: int | None = None,
    failed: dict[Variant, EmitError] | None = None,
) -> dict[Variant, Compiled]:
    """Machine code for every variant; the same variants give the same bytes in any process and folder.

    Args:
        on_done: gets (done, total) as work proceeds.
        jobs: processes; None takes a core each. What is in the compile cache (docs/compile-cache.md) starts none.
        failed: gets the variants that do not compile; None takes the first of them for an error.

    Raises:
        EmitError: a kernel does not compile, named; the others that were begun are finished first.
    """
    wanted = list(dict.fromkeys(variants))
    made: dict[Variant, Compiled] = {}
    for variant in wanted:
        if (found := _cached(variant)) is not None:
            made[variant] = found
    missing = [variant for variant in wanted if variant not in made]
    on_done(len(made), len(wanted))
    todo: queue.SimpleQueue[Variant] = queue.SimpleQueue()
    for variant in missing:
        todo.put(variant)
    done: queue.SimpleQueue[tuple[Variant, Compiled | EmitError]] = queue.SimpleQueue()
    count = min(jobs or default_jobs(), len(missing))
    threads = [threading.Thread(target=_drive, args=(todo, done), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    stop: EmitError | None = None
    for _ in missing:
        variant, result = done.get()
        if isinstance(result, EmitError) and failed is not None:
            failed[variant] = result
            continue
        if isinstance(result, EmitError):
            stop = stop or result
            with suppress(queue.Empty):  # the rest is not begun any more
                while True:
                    done.put((todo.get_nowait(), result))
            continue
        made[variant] = result
        _keep(variant, result)
        on_done(len(made), len(wanted))
    for thread in threads:
        thread.join()
    if stop is not None:
        raise stop
    return {variant: made[variant] for variant in wanted if variant in made}


def _drive(todo: queue.SimpleQueue[Variant], done: queue.SimpleQueue[tuple[Variant, Compiled | EmitError]]) -> None:
    """One thread: a child process, which gets variants until there are none. Every variant that is taken has a result,
    whatever goes wrong: somebody waits for it."""
    child: subprocess.Popen[str] | None = None
    while True:
        try:
            variant = todo.get_nowait()
        except queue.Empty:
            break
        try:
            child = child or _start()
            done.put((variant, _ask(child, variant)))
        except Exception as error:
            what = f"no process could be started, or talked to, that compiles kernels: {reason(error)}"
            fix = "run the command again, with fewer --jobs"
            failed = EmitError(what, where=variant_key(variant), fix=fix)
            failed.__cause__ = error  # for --debug: it is raised where somebody waits, not here
            done.put((variant, failed))
    if child is not None:
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):  # it may have ended
            child.stdin.close()
        child.wait()
        child.stdout.close()


def _start() -> subprocess.Popen[str]:
    """A child. It has a process group of its own: what stops the command (Ctrl-C in a terminal reaches a whole group)
    ends the child by the end of its input, and the command alone says that it was stopped."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        python_module(__name__), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        process_group=0,
    )  # fmt: skip


def _ask(child: subprocess.Popen[str], variant: Variant) -> Compiled | EmitError:
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(_request(variant)) + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline() or "null")
    except (BrokenPipeError, ValueError):
        answer = None
    if not isinstance(answer, dict):
        return _ended(variant, _code(child))
    if "error" in answer:
        return EmitError(answer["error"], where=answer["where"], fix=answer["fix"])
    return _compiled(answer)


def _code(child: subprocess.Popen[str]) -> int:
    """How a child ended; one that does not, and gave no answer that can be read, is ended."""
    try:
        return child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _ended(variant: Variant, code: int) -> EmitError:
    """The error of a variant whose child is gone."""
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    fix = "run the command again, with fewer --jobs or more memory free"
    if code != -signal.SIGKILL:
        fix = "run the command again; if it ends in the same way, report the kernel"
    return EmitError(f"the process that compiles kernels ended {how}", where=variant_key(variant), fix=fix)


def _request(variant: Variant) -> dict[str, Any]:
    return dict(vars(variant))


def _compiled(answer: dict[str, Any]) -> Compiled:
    return Compiled(cubin=base64.b64decode(answer["cubin"]), **{name: answer[name] for name in FIGURES})


def _answer(compiled: Compiled) -> dict[str, Any]:
    figures = {name: getattr(compiled, name) for name in FIGURES}
    return {**figures, "cubin": base64.b64encode(compiled.cubin).decode("ascii")}


def kept_folder() -> Path | None:
    """Where the compile cache keeps the variants of this tool chain, a file each; None without a cache."""
    folder = cache_folder()
    return None if folder is None else folder / "triton" / toolchain()[:16]


def _place(variant: Variant) -> Path | None:
    folder = kept_folder()
    return None if folder is None else folder / f"{variant_key(variant)}.json"


def _cached(variant: Variant) -> Compiled | None:
    """What an earlier compilation left; None where there is nothing, or something that is not whole."""
    place = _place(variant)
    if place is None:
        return None
    try:
        stored = json.loads(place.read_bytes())
        compiled = _compiled(stored)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return compiled if stored.get("sha256") == compiled.digest else None


def _keep(variant: Variant, compiled: Compiled) -> None:
    """Stores a variant by one rename; where the cache cannot be written, compiling goes on without it."""
    place = _place(variant)
    if place is None:
        return
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_name(f"{place.name}.{os.getpid()}.new")
        new.write_text(json.dumps({**_answer(compiled), "sha256": compiled.digest}))
        new.replace(place)


def frozen(value: Any) -> Any:
    """A constexpr as it was before it was JSON: its sequences are tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def serve() -> None:
    """The child: one variant a line, one answer a line."""
    from tmlc.kernels.triton.variants import compile_variant

    for line in sys.stdin:
        request = json.loads(line)
        constexprs = tuple((name, frozen(value)) for name, value in request.pop("constexprs"))
        variant = Variant(**{**request, "constexprs": constexprs, "signature": tuple(request["signature"])})
        try:
            answer = _answer(compile_variant(variant))
        except TmlcError as error:
            answer = {"error": error.what, "where": error.where, "fix": error.fix}
        try:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # whoever asked is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return


if __name__ == "__main__":
    serve()
