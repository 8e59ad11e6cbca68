"""The single-file form of a package: a plain zip, stored, its comment a sha256 that covers every byte before.

The digest is taken over the file with the data of each member replaced by the member's own sha256, so that one
reading gives both: that nothing was altered, and the digests that the manifest lists.

Any zip tool opens it. The writer goes through the file once, from front to back, so members may be larger
than memory; the reader accepts exactly what such a writer makes and treats everything else as damage.
"""

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

from tmlc.errors import REPORT, PackageError
from tmlc.package.fields import check_member_name

COMMENT = b"tmlc-sha256:"
TRAILER = len(COMMENT) + 64
ZIP64_FROM = 0xFFFFFFFF  # sizes and offsets from here on need the 64-bit fields
MAX_MEMBERS = 4096

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_DATE = (
    1 << 5
) | 1  # 1980-01-01, the first day a zip can name: packages must not depend on when they were made
_FLAGS = 0x0808  # sizes and checksum follow the data; names are UTF-8
_PAD_ID = 0xD935  # the extra field that Android's zipalign uses for padding
Fail = Callable[[str], PackageError]
_AGAIN = "Get the package again from its source, or compile it again."


@dataclass(frozen=True)
class Member:
    """A stored file: `size` bytes at `offset` from the start of the package."""

    name: str
    offset: int
    size: int


class ZipWriter:
    """Writes members one after the other into a binary file opened for writing."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset, self.digest = file, 0, hashlib.sha256()
        self.central: list[bytes] = []

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)

    def add(self, name: str, size: int, pieces: Iterable[bytes | memoryview], align: int = 1) -> str:
        """Writes one member of `size` bytes, its data at a multiple of `align`; gives back its sha256."""
        big = size >= ZIP64_FROM
        encoded = name.encode()
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if big else b""
        if align > 1:
            gap = -(self.offset + _LOCAL.size + len(encoded) + len(extra) + 4) % align
            extra += struct.pack("<2H", _PAD_ID, gap) + bytes(gap)
        start, version = self.offset, 45 if big else 20
        known = 0xFFFFFFFF if big else 0
        head = (version, _FLAGS, 0, 0, _DATE, 0, known, known, len(encoded), len(extra))
        self._put(_LOCAL.pack(b"PK\3\4", *head) + encoded + extra)
        digest, crc, count = hashlib.sha256(), 0, 0
        for piece in pieces:
            self.file.write(piece)
            digest.update(piece)
            crc = zlib.crc32(piece, crc)
            count += len(piece)
        if count != size:
            raise PackageError(f"{name} came to {count} bytes, expected {size}", where=name, fix=REPORT)
        self.offset += count
        self.digest.update(digest.digest())
        self._put(struct.pack("<4sI2Q" if big else "<4sI2I", b"PK\7\10", crc, size, size))
        self.central.append(_central_entry(encoded, crc, size, start))
        return digest.hexdigest()

    def finish(self) -> None:
        """Writes the directory and the trailer. Nothing may be added after it."""
        start = self.offset
        self._put(b"".join(self.central))
        size, count = self.offset - start, len(self.central)
        if self.offset >= ZIP64_FROM:
            end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
            self._put(end64 + _LOCATOR.pack(b"PK\6\7", 0, self.offset, 1))
            start = 0xFFFFFFFF
        self._put(_END.pack(b"PK\5\6", 0, 0, count, count, min(size, 0xFFFFFFFF), start, TRAILER))
        self.file.write(COMMENT + self.digest.hexdigest().encode())


def _central_entry(name: bytes, crc: int, size: int, start: int) -> bytes:
    wide = []
    shown_size, shown_start = size, start
    if size >= ZIP64_FROM:
        wide += [size, size]
        shown_size = 0xFFFFFFFF
    if start >= ZIP64_FROM:
        wide.append(start)
        shown_start = 0xFFFFFFFF
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = 45 if wide else 20
    head = (
        version | 3 << 8,
        version,
        _FLAGS,
        0,
        0,
        _DATE,
        crc,
        shown_size,
        shown_size,
        len(name),
        len(extra),
    )
    return _CENTRAL.pack(b"PK\1\2", *head, 0, 0, 0, 0o100644 << 16, shown_start) + name + extra


def check_ends(data: memoryview, where: str) -> None:
    """Checks that the file begins and ends as a package does.

    Raises:
        PackageError: not a package, or cut short.
    """
    if len(data) < 4 or bytes(data[:4]) != b"PK\3\4":
        raise PackageError(
            "not a tmlc package", where=where, fix="Give a .tmlc file that `tmlc compile` wrote."
        )
    body = len(data) - TRAILER
    if body < _END.size or bytes(data[body : body + len(COMMENT)]) != COMMENT:
        raise PackageError(
            "the package is cut short, or is a zip that tmlc did not write", where=where, fix=_AGAIN
        )


def digests(data: memoryview, members: dict[str, Member]) -> tuple[str, dict[str, str]]:
    """Reads every byte once: the digest that the file's comment must hold, and the sha256 of each member."""
    whole, single, at = hashlib.sha256(), {}, 0
    for member in members.values():  # in the order in which they lie
        digest = hashlib.sha256(data[member.offset : member.offset + member.size])
        whole.update(data[at : member.offset])
        whole.update(digest.digest())
        single[member.name] = digest.hexdigest()
        at = member.offset + member.size
    whole.update(data[at : len(data) - TRAILER])
    return whole.hexdigest(), single


def check_digests(data: memoryview, members: dict[str, Member], where: str) -> dict[str, str]:
    """The sha256 of each member, once every byte is known to be the writer's.

    Raises:
        PackageError: altered.
    """
    whole, single = digests(data, members)
    if bytes(data[-64:]) != whole.encode():
        raise PackageError(
            "the package was altered or damaged: its digest does not match", where=where, fix=_AGAIN
        )
    return single


def read_members(data: memoryview, where: str) -> dict[str, Member]:
    """The directory of the package.

    Raises:
        PackageError: anything that `ZipWriter` does not write: compression, encryption, names that lead
            outside, members twice, outside the file or on top of each other.
    """

    def bad(what: str) -> PackageError:
        return PackageError(f"the package's directory is damaged: {what}", where=where, fix=_AGAIN)

    at = len(data) - TRAILER - _END.size
    if at < 0:
        raise bad("no end record")
    magic, disk, disk2, count, count2, size, start, comment = _END.unpack_from(data, at)
    if magic != b"PK\5\6" or disk or disk2 or count != count2 or comment != TRAILER:
        raise bad("wrong end record")
    end = at
    if start == 0xFFFFFFFF:
        at -= _LOCATOR.size
        if at < 0:
            raise bad("no locator")
        magic, disk, where64, disks = _LOCATOR.unpack_from(data, at)
        if magic != b"PK\6\7" or disk or disks != 1 or where64 != at - _END64.size:
            raise bad("wrong locator")
        end = at = where64
        head = _END64.unpack_from(data, at)
        magic, _, _, _, disk, disk2, count, count2, size, start = head
        if magic != b"PK\6\6" or disk or disk2 or count != count2:
            raise bad("wrong 64-bit end record")
    if start + size != end or count > MAX_MEMBERS:
        raise bad("wrong size")
    members: dict[str, Member] = {}
    at = start
    last = 0
    for _ in range(count):
        member, at = _read_entry(data, at, end, last, start, bad)
        if member.name in members:
            raise bad(f"{member.name} is there twice")
        members[member.name] = member
        last = member.offset + member.size
    if at != end:
        raise bad("bytes after the last entry")
    return members


def _read_entry(
    data: memoryview, at: int, end: int, after: int, before: int, fail: Fail
) -> tuple[Member, int]:
    """One directory entry at `at`; the member must lie between `after` and `before`."""
    if at + _CENTRAL.size > end:
        raise fail("cut short")
    fields = _CENTRAL.unpack_from(data, at)
    magic, _, _, flags, method, _, _, _, packed, size, n_name, n_extra, n_comment, disk, _, _, start = fields
    if magic != b"PK\1\2" or flags != _FLAGS or method or packed != size or n_comment or disk:
        raise fail("an entry is not a plain stored file")
    at += _CENTRAL.size
    if at + n_name + n_extra > end:
        raise fail("cut short")
    raw, extra = bytes(data[at : at + n_name]), bytes(data[at + n_name : at + n_name + n_extra])
    name = check_member_name(raw.decode("ascii", "replace"))
    size, start = _widen(extra, size, start, fail)
    if start < after or start + _LOCAL.size > before:
        raise fail(f"{name} is out of place")
    local = _LOCAL.unpack_from(data, start)
    offset = start + _LOCAL.size + local[9] + local[10]
    if local[0] != b"PK\3\4" or bytes(data[start + _LOCAL.size : start + _LOCAL.size + local[9]]) != raw:
        raise fail(f"{name} has another name where it lies")
    if offset + size > before:
        raise fail(f"{name} is larger than the file")
    return Member(name, offset, size), at + n_name + n_extra


def _widen(extra: bytes, size: int, start: int, bad: Fail) -> tuple[int, int]:
    """Size and offset, from the 64-bit fields where the short ones say so."""
    wanted = (size == 0xFFFFFFFF) * 2 + (start == 0xFFFFFFFF)
    if not wanted and not extra:
        return size, start
    if len(extra) != 4 + 8 * wanted or extra[:4] != struct.pack("<2H", 1, 8 * wanted):
        raise bad("wrong 64-bit fields")
    values = list(struct.unpack(f"<{wanted}Q", extra[4:]))
    if size == 0xFFFFFFFF:
        size = values.pop(0)
        if values.pop(0) != size:
            raise bad("wrong 64-bit fields")
    return size, values[0] if start == 0xFFFFFFFF else start
