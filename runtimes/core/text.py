"""Text to tokens and back, piece by piece, from the `tokenizer.json` in the package.

A byte-level vocabulary without merges (the models of this project's zoo) is built in; any other tokenizer
needs the `tokenizers` package. Typed text can never produce a special token: what the user types is text,
not control.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tmlc.errors import InputError, PackageError, TmlcError, reason
from tmlc.package.fields import AGAIN

MAX_ID = 1 << 22  # the library makes tables as long as the largest id
MAX_GROWTH = 1 << 10  # how many characters one typed character may become
_UNKNOWN = "leave out the characters that the model has no tokens for"


class Tokenizer(ABC):
    """Both directions of one vocabulary."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of `text`; never a special token."""

    @abstractmethod
    def decoder(self, state: Sequence[int] = ()) -> TextDecoder:
        """An incremental decoder, at its start or where `TextDecoder.state` was taken."""

    @abstractmethod
    def special(self, name: str) -> int | None:
        """The special token that is written `name`, such as "<injection>"; None when there is none."""


class TextDecoder(ABC):
    """Turns tokens into text as they come; a character split over tokens appears when it is whole."""

    @abstractmethod
    def push(self, tokens: Iterable[int]) -> str:
        """The new text that these tokens make certain; special tokens give none."""

    @abstractmethod
    def state(self) -> list[int]:
        """What the decoder remembers, for snapshots: a few numbers that only its tokenizer understands."""


def _utf8(text: str) -> bytes:
    """`text` in UTF-8; InputError when it holds half of a surrogate pair, which is no character."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode at character {error.start}", fix="leave out the lone surrogate there"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte, as GPT-2 defined it."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in kept}
    alphabet |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in set(kept))}
    return alphabet


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8; `byte_of` maps token ids to bytes, other ids are special; `special` names some."""

    def __init__(self, byte_of: dict[int, int], special: dict[str, int] | None = None) -> None:
        self._byte_of, self._special = byte_of, special or {}
        self._token_of = [0] * 256
        for token, byte in byte_of.items():
            self._token_of[byte] = token

    def encode(self, text: str) -> list[int]:
        return [self._token_of[b] for b in _utf8(text)]

    def decoder(self, state: Sequence[int] = ()) -> TextDecoder:
        return _ByteDecoder(self._byte_of, self._token_of, state)

    def special(self, name: str) -> int | None:
        return self._special.get(name)


class _ByteDecoder(TextDecoder):
    def __init__(self, byte_of: dict[int, int], token_of: list[int], state: Sequence[int]) -> None:
        self._byte_of, self._token_of = byte_of, token_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.push(state)

    def push(self, tokens: Iterable[int]) -> str:
        byte_of = self._byte_of
        return self._utf8.decode(bytes(byte_of[t] for t in tokens if t in byte_of))

    def state(self) -> list[int]:
        return [self._token_of[b] for b in self._utf8.getstate()[0]]


@contextmanager
def _library(fails: type[TmlcError], what: str, fix: str) -> Iterator[None]:
    """Around a call of the library, which raises plain Exception for whatever is wrong in a tokenizer; a panic of its
    Rust code is not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise fails(f"{what}: {reason(error)}", where="tokenizer.json", fix=fix) from None


def _growth(part: Any) -> int:
    """How much longer the replacements in a part of a tokenizer can make a text, one applied to what another gave.

    Raises ValueError for a character map that is cut short: the library would reserve what its first bytes say.
    """
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    if part.get("type") == "Precompiled":
        charsmap = base64.b64decode(part["precompiled_charsmap"])
        if not 4 <= int.from_bytes(charsmap[:4], "little") <= len(charsmap) - 4:
            raise ValueError("its character map is cut short")
    added = part.get("content", part.get("prepend")) if part.get("type") in ("Replace", "Prepend") else None
    own = 1 + len(added) if isinstance(added, str) else 1
    return own * math.prod(map(_growth, part.values()))


class MissingLibraryError(PackageError):
    """A tokenizer that needs the `tokenizers` package, which is not installed."""


class LibraryTokenizer(Tokenizer):
    """Any other `tokenizer.json`, through the `tokenizers` package."""

    def __init__(self, text: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise MissingLibraryError(
                "this package's tokenizer is not byte-level and the `tokenizers` package is not installed",
                fix="pip install 'tmlc[text]'",
            ) from None
        with _library(PackageError, "the package's tokenizer cannot be read", AGAIN):
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            self._tokenizer.encode_special_tokens = True
            # Typed text is neither cut nor filled up nor put into a template, whatever the file was made for.
            self._tokenizer.post_processor = None
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.get_added_tokens_decoder().items()
            self._special = {token.content: number for number, token in added if token.special}

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        with _library(InputError, "the package's tokenizer cannot take this text", _UNKNOWN):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens` without special ones. Raises PackageError when the library fails on them."""
        with _library(PackageError, "the package's tokenizer cannot write this text", AGAIN):
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def decoder(self, state: Sequence[int] = ()) -> TextDecoder:
        return _LibraryDecoder(self, state)

    def special(self, name: str) -> int | None:
        return self._special.get(name)


class _LibraryDecoder(TextDecoder):
    """Decodes a short window of tokens twice, with and without the new ones: the difference is the new
    text.

    The window keeps the tokens of the last piece, because a decoder may join words across tokens.
    """

    def __init__(self, tokenizer: LibraryTokenizer, state: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._done, *self._window = state or (0,)

    def push(self, tokens: Iterable[int]) -> str:
        self._window += tokens
        before = self._tokenizer.decode(self._window[: self._done])
        after = self._tokenizer.decode(self._window)
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        self._window = self._window[self._done :]
        self._done = len(self._window)
        return after[len(before) :]

    def state(self) -> list[int]:
        return [self._done, *self._window]


def load_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer that the bytes of a `tokenizer.json` describe; PackageError when they are not one."""
    where = "tokenizer.json"
    try:
        text = data.decode()
        spec = json.loads(text)
        model = spec["model"]
        kind, vocab, merges = model["type"], dict(model["vocab"]), model.get("merges", [])
        added = spec.get("added_tokens") or []
        special = {t["content"] for t in added}
        split = spec.get("pre_tokenizer") or {}
        plain = not split.get("add_prefix_space") and not spec.get("normalizer")
        ids = model["vocab"].values() if isinstance(model["vocab"], dict) else ()
        named = {t["content"]: t["id"] for t in added if t.get("special")}
        sane = all(type(i) is int and 0 <= i < MAX_ID for i in [*ids, *named.values()]) and not model.get("dropout")
        sane = sane and all(_growth(spec.get(p)) <= MAX_GROWTH for p in ("normalizer", "pre_tokenizer", "decoder"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"not the JSON of a tokenizer ({' '.join(str(error).split())[:120]})"
        raise PackageError(f"the package's tokenizer cannot be read: {reason}", where=where, fix=AGAIN) from None
    if not sane:
        raise PackageError("the package's tokenizer has absurd ids, chance or replacements", where=where, fix=AGAIN)
    if kind != "BPE" or not ids or merges or split.get("type") != "ByteLevel" or not plain:
        return LibraryTokenizer(text)
    alphabet = _byte_alphabet()
    byte_of = {i: alphabet[c] for c, i in vocab.items() if c in alphabet and c not in special}
    others = [c for c in vocab if c not in alphabet and c not in special]
    if others or len(byte_of) != 256:
        return LibraryTokenizer(text)
    return ByteTokenizer(byte_of, {name: i for name, i in named.items() if i not in byte_of})
