"""Where finished packages are kept, checked and handed out.

    packages/<digest of the key>/package.tmlc    the package, a file or a folder
    packages/<digest of the key>/entry.json      its key, the compile report, size and time of every file
    lookups/<digest of the checkpoint's path>    the last look-ups of a checkpoint, for `tmlc inspect --why-miss`
    digests.json                                 the memo of file digests

An entry appears by one rename, and a package at its destination too. The cache may be deleted at any time. Where it
cannot be written, compiling goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tmlc.cache.key import CompileKey, DigestMemo, write_whole
from tmlc.errors import PackageError

MOST_BYTES = 20 * 2**30  # the least recently used entries beyond this are removed
READ_WHOLE = 512 * 2**20  # packages up to this size are read and checked byte by byte before they are handed out
LOOKUPS = 8
STALE = 24 * 3600.0  # what an interrupted run left in the cache is removed after a day

_ENTRY, _PACKAGE = "entry.json", "package.tmlc"


def cache_folder() -> Path | None:
    """`$TMLC_CACHE` (`off`: no cache), else `$XDG_CACHE_HOME/tmlc`, else `~/.cache/tmlc`."""
    chosen = os.environ.get("TMLC_CACHE", "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "tmlc"


@dataclass
class Lookup:
    """One look-up of a compilation.

    Attributes:
        outcome: "hit" or "miss".
        reason: of a miss, in a few words.
        changed: [part, value then, value now] against the compilation that is most alike.
    """

    checkpoint: str
    out: str
    outcome: str
    reason: str = ""
    changed: list[list[str]] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What a person asks for: everything but the parts."""
        return {name: value for name, value in asdict(self).items() if name != "parts"}


class CompileCache:
    """The cache in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memo = DigestMemo(folder / "digests.json")

    def find(self, key: CompileKey, checkpoint: Path, out: Path) -> tuple[Lookup, dict[str, Any] | None]:
        """Looks a compilation up and notes the look-up.

        Returns:
            What was found, and the report of the earlier compilation if its package is there and whole.
        """
        entry = self._entry(key)
        report, damage = None, ""
        if entry.is_dir():
            try:
                report = _check(entry, key)
                with suppress(OSError):
                    os.utime(entry / _ENTRY)  # the least recently used go first
            except (OSError, ValueError, KeyError, TypeError, PackageError) as error:
                damage = error.what if isinstance(error, PackageError) else str(error)
                shutil.rmtree(entry, ignore_errors=True)
        lookup = Lookup(str(checkpoint.resolve()), str(out.absolute()), "miss" if report is None else "hit")
        lookup.parts = key.parts
        earlier = self._lookups(lookup.checkpoint)
        if damage:
            lookup.reason = f"the entry was damaged ({damage}) and is made again"
        elif report is None:
            self._explain(lookup, earlier)
        with suppress(OSError):
            kept = [asdict(one) for one in [*earlier, lookup][-LOOKUPS:]]
            write_whole(self._lookup_file(lookup.checkpoint), json.dumps(kept).encode())
            self.memo.save()
        return lookup, report

    def deliver(self, key: CompileKey, out: Path) -> None:
        """Puts the package of an entry at `out`, whole: as a hard link where the disk is the same, else as a copy.

        Raises:
            PackageError: `out` is a folder that is no package, or the place cannot be written.
        """
        from tmlc.package.writer import disk_errors, make_parents, remove_parents, replaceable, swap_folder

        source = self._entry(key) / _PACKAGE
        if out.is_dir() and not (source.is_dir() and replaceable(out)):
            raise PackageError(f"{out} is a folder", where="output", fix="Give another name, or remove the folder.")
        temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
        made: list[Path] = []
        with disk_errors(out):
            try:
                made = make_parents(out)
                _link(source, temporary)
                if source.is_dir():
                    swap_folder(temporary, out)
                else:
                    os.replace(temporary, out)
            except BaseException:
                _remove(temporary)
                remove_parents(made)
                raise
            _remove(temporary)  # a rename between two names of one file leaves both

    def store(self, key: CompileKey, package: Path, report: dict[str, Any]) -> str:
        """Keeps a finished package. Returns what went wrong, "" when nothing did: a cache never stops a compilation."""
        entry = self._entry(key)
        temporary = entry.with_name(f".{entry.name}.{os.getpid()}.part")
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            _link(package, temporary / _PACKAGE)
            files = _files(temporary / _PACKAGE)
            body = {"parts": key.parts, "report": report, "files": files}
            (temporary / _ENTRY).write_text(json.dumps(body), "utf-8")
            shutil.rmtree(entry, ignore_errors=True)
            os.rename(temporary, entry)
            self._make_room(keep=entry)
        except OSError as error:
            return f"the cache in {self.folder} cannot be written: {error.strerror or error}"
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return ""

    def why_miss(self, path: Path) -> Lookup | None:
        """The last look-up of a checkpoint folder, or of a package by the place it was written to."""
        own = self._lookups(str(path.resolve()))
        if own:
            return own[-1]
        found = []
        with suppress(OSError):
            for file in (self.folder / "lookups").iterdir():
                last = [one for one in _read_lookups(file) if one.out == str(path.absolute())]
                found += [(file.stat().st_mtime, one) for one in last[-1:]]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def _entry(self, key: CompileKey) -> Path:
        return self.folder / "packages" / key.digest

    def _lookup_file(self, checkpoint: str) -> Path:
        return self.folder / "lookups" / f"{hashlib.sha256(checkpoint.encode()).hexdigest()[:32]}.json"

    def _lookups(self, checkpoint: str) -> list[Lookup]:
        return _read_lookups(self._lookup_file(checkpoint))

    def _explain(self, lookup: Lookup, earlier: list[Lookup]) -> None:
        """Compares with the earlier compilation that differs least: first of this checkpoint, then of any."""
        candidates = [one.parts for one in reversed(earlier)]
        if not candidates:
            for file in (self.folder / "packages").glob(f"*/{_ENTRY}"):
                with suppress(OSError, ValueError, KeyError):
                    candidates.append(json.loads(file.read_bytes())["parts"])
        if not candidates:
            lookup.reason = "nothing was compiled with this cache before"
            return
        nearest = min((_differences(parts, lookup.parts) for parts in candidates), key=len)
        lookup.changed = nearest
        if nearest:
            names = [name for name, _, _ in nearest]
            lookup.reason = f"changed: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" * (len(names) > 4))
        else:
            lookup.reason = "its entry is not in the cache: that compilation did not end, or the entry was removed"

    def _make_room(self, keep: Path) -> None:
        entries = []
        for entry in (self.folder / "packages").iterdir():
            if entry.name.startswith("."):
                if time.time() - entry.stat().st_mtime > STALE:
                    shutil.rmtree(entry, ignore_errors=True)
            elif (entry / _ENTRY).is_file():
                size = sum(file.stat().st_size for file in entry.rglob("*") if file.is_file())
                entries.append(((entry / _ENTRY).stat().st_mtime_ns, size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= MOST_BYTES:
                break
            if entry != keep:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


def _read_lookups(file: Path) -> list[Lookup]:
    try:
        return [Lookup(**one) for one in json.loads(file.read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _differences(then: dict[str, str], now: dict[str, str]) -> list[list[str]]:
    names = [*now, *(name for name in then if name not in now)]
    pairs = [[name, then.get(name, "(absent)"), now.get(name, "(absent)")] for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _check(entry: Path, key: CompileKey) -> dict[str, Any]:
    """The report of an entry whose package is whole; anything else raises."""
    body = json.loads((entry / _ENTRY).read_bytes())
    if body["parts"] != key.parts:
        raise ValueError("it belongs to another key")
    package = entry / _PACKAGE
    files = _files(package)
    if files != body["files"]:
        raise ValueError("its files are not those that were stored")
    if sum(size for size, _ in files.values()) <= READ_WHOLE:
        from tmlc.package.reader import open_package

        with open_package(package):
            pass
    report = body["report"]
    if not isinstance(report, dict):
        raise ValueError("it has no report")
    return report


def _files(package: Path) -> dict[str, list[int]]:
    """Size and time of every file of a package: written anew or cut, one of them is another. Not the inode's own time,
    which a further link moves."""
    files = sorted(p for p in package.rglob("*") if p.is_file()) if package.is_dir() else [package]
    stats = {file.relative_to(package.parent).as_posix(): file.stat() for file in files}
    return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}


def _link(source: Path, target: Path) -> None:
    """Hard links (copies, between disks) of a file or of every file of a folder."""
    if not source.is_dir():
        _link_file(source, target)
        return
    target.mkdir()
    for file in sorted(source.rglob("*")):  # parents before what is in them; copytree would hide which error it was
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir()
        else:
            _link_file(file, place)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # a place where nothing can be written cannot be cleaned either
            path.unlink(missing_ok=True)
