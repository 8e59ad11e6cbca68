"""Which methods a tick runs in one graph, and where what passes between them lies.

`compose` says it for every chain and number of sessions; the compiler makes the launches that move rows between methods
from it (tmlc/emit/triton/chains.py), and the runtime binds them (docs/triton.md, "Chains"). What is live where is said
by counts and row numbers that the host uploads with the inputs, so one graph serves every mix of sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tmlc.package.manifest import TickLayout
from tmlc.runtimes.core.backend import MethodSpec, TensorSpec
from tmlc.runtimes.cuda.plan import argument_bytes, up

NAMES = ("listen", "listen_text", "write", "speak", "rest")
"""listen: sound in (and tokens), the first token out; write: a token in, the next out; speak: the end of the text in,
samples out, position by position, for sessions that speak and silent ones; rest: the same where all are silent."""

Pairs = Mapping[str, Sequence[tuple[int, int]]]
Place = tuple[str, int]
"""A space of the chain, "input" (uploaded), "between" or "output" (copied back), and bytes into it."""


@dataclass(frozen=True, slots=True)
class Link:
    """A method in its bucket with n positions."""

    method: str
    n: int
    counts: int
    inputs: tuple[Place, ...]
    output: Place


@dataclass(frozen=True, slots=True)
class Take:
    """Row k of `out` becomes row index[k] of `source`, float32 [entries, cols]; rows with index -1 stay."""

    source: Place
    entries: int
    index: int
    out: Place
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class Clamp:
    """`out` is `source`, float32 [rows, cols], held to [-1, 1]."""

    source: Place
    out: Place
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, start + n) of each session's rows for `decode`: where their counts are, the row numbers in each
    source, and those of rows that are a session's last."""

    start: int
    n: int
    counts: int
    takes: tuple[int, ...]
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One chain for up to `batch` sessions.

    Attributes:
        nbytes: of each space.
        links: in order.
        fields: where the host writes its inputs and reads results, by name: bytes into `input` or `output`.
        counts: where the counts of each method are that the host sets.
        rows: for each source of `decode` the rows of a session in it.
        pieces: of `decode`'s first run.
        indices: (bytes into `input`, row numbers) of each list of row numbers.
    """

    name: str
    batch: int
    nbytes: dict[str, int]
    links: tuple[Link | Take | Clamp, ...]
    fields: dict[str, int]
    counts: dict[str, int]
    rows: tuple[int, ...]
    pieces: tuple[Piece, ...]
    indices: tuple[tuple[int, int], ...]

    @property
    def key(self) -> str:
        return f"{self.name}.b{self.batch}"

    @property
    def frame(self) -> int:
        """Columns of a position's mel frames, in chains that speak."""
        return next(link.cols for link in self.links if isinstance(link, Take) and link.entries == 1)

    def positions(self, method: str) -> int:
        """Padded positions of a session in the first run of a method."""
        return next(link.n for link in self.links if isinstance(link, Link) and link.method == method)

    @property
    def glue(self) -> list[Take | Clamp]:
        """What is not a method: a launch each, in order."""
        return [link for link in self.links if not isinstance(link, Link)]


class NoBucket(Exception):
    """A method has no bucket of the size that a chain needs: both are its message."""

    def __init__(self, method: str, batch: int, n: int) -> None:
        super().__init__(f"{method} has no bucket of {batch}x{n} (sessions x positions)")


def tail_tokens(name: str, layout: TickLayout) -> int:
    """The most tokens that end a tick's text: the last and <end_of_tick>, or all that it was given to say."""
    return max(2, layout.text_out + 1) if name == "speak" else 2


def compose(methods: Mapping[str, MethodSpec], buckets: Pairs, layout: TickLayout) -> list[Chain]:
    """Every chain that the buckets have room for; none where some chain has not even one for a single session.

    Args:
        methods: of an interaction model that speaks, in the form that `runtimes.core.model` asks for.
        buckets: (sessions, positions) of each method.
    """
    if lacking(methods, buckets, layout):
        return []
    made = []
    for name in NAMES:
        for batch in sorted({b for b, _ in buckets["decode"]}):
            try:
                made.append(_Builder(batch, methods, buckets, layout).build(name))
            except NoBucket:
                continue
    return made


def lacking(methods: Mapping[str, MethodSpec], buckets: Pairs, layout: TickLayout) -> str:
    """Why there are no chains: the first bucket that a tick of a single session asks for in vain; empty if none is."""
    for name in NAMES:
        try:
            _Builder(1, methods, buckets, layout).build(name)
        except NoBucket as error:
            return str(error)
    return ""


class _Builder:
    def __init__(self, batch: int, methods: Mapping[str, MethodSpec], buckets: Pairs, layout: TickLayout) -> None:
        self.batch, self.methods, self.layout = batch, methods, layout
        self.buckets = {name: sorted(n for b, n in pairs if b == batch) for name, pairs in buckets.items()}
        self.nbytes = {"input": 0, "between": 0, "output": 0}
        self.links: list[Link | Take | Clamp] = []
        self.fields: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.rows: tuple[int, ...] = ()
        self.pieces: list[Piece] = []
        self.indices: list[tuple[int, int]] = []
        self.room("input", 8 * batch)  # the slots

    def build(self, name: str) -> Chain:
        {"listen": self.listen, "listen_text": self.listen_text, "write": self.write, "speak": self.speak,
         "rest": self.rest}[name]()  # fmt: skip
        return Chain(
            name, self.batch, self.nbytes, tuple(self.links), self.fields, self.marks, self.rows, tuple(self.pieces),
            tuple(self.indices),
        )  # fmt: skip

    # The chains.

    def listen(self, text: bool = False) -> None:
        heard = self.least("embed_audio", self.layout.audio_in)
        sound = self.run("embed_audio", heard, [self.argument("pcm", "embed_audio", 0, heard)])
        sources, most = [(sound, heard)], self.layout.audio_in
        if text:
            rows, count = self.tokens(max(1, self.layout.text_in))
            sources.append((rows, count))
            most += count
        self.choose(self.decode(sources, most))

    def listen_text(self) -> None:
        self.listen(text=True)

    def write(self) -> None:
        rows, _ = self.tokens(1)
        self.choose(self.run("decode", 1, [rows]))

    def speak(self) -> None:
        most = tail_tokens("speak", self.layout)
        heard = self.run("embed_speech", 1, [self.argument("heard", "embed_speech", 0, 1)])
        text, count = self.tokens(most)
        hidden = self.decode([(text, count), (heard, 1)], most + 1)
        quiet, silent = self.quiet(), self.index("silent", self.batch)
        for j in range(self.layout.audio_out):
            mel = self.run("speak", 1, [hidden, self.argument(f"key{j}", "speak", 1, 1)])
            self.links.append(Take(quiet, 1, silent, mel, self.batch, self.frame))
            pcm = self.result(f"pcm{j}", "vocode", 1)
            self.run("vocode", 1, [mel], pcm)
            if j + 1 < self.layout.audio_out:
                own = self.run("embed_speech", 1, [self.clamp(pcm, self.batch)])
                hidden = self.run("decode", 1, [own], counts="after")

    def rest(self) -> None:
        count = self.layout.audio_out
        mels, heard = self.least("vocode", count), self.least("embed_speech", count)
        mel, quiet = self.space(self.methods["vocode"].inputs[0], mels), self.quiet()
        self.links.append(Take(quiet, 1, self.index("mel", self.batch * mels), mel, self.batch * mels, self.frame))
        pcm = self.result("pcm", "vocode", mels)
        self.run("vocode", mels, [mel], pcm)
        said = self.clamp(pcm, self.batch * mels)
        own, cols = self.space(self.methods["embed_speech"].inputs[0], heard), self.layout.hop
        before = self.argument("heard", "embed_speech", 0, 1)
        for name, source, entries in (("later", said, self.batch * mels), ("first", before, self.batch)):
            index = self.index(name, self.batch * heard)
            self.links.append(Take(source, entries, index, own, self.batch * heard, cols))
        speech = self.run("embed_speech", heard, [own])
        most = tail_tokens("rest", self.layout)
        text, width = self.tokens(most)
        self.decode([(text, width), (speech, heard)], most + count)

    # Their parts.

    @property
    def frame(self) -> int:
        """Columns of a position's mel frames."""
        return self.layout.frames_per_position * self.layout.n_mel

    def tokens(self, most: int) -> tuple[Place, int]:
        n = self.least("embed_text", most)
        return self.run("embed_text", n, [self.argument("ids", "embed_text", 0, n)]), n

    def choose(self, hidden: Place) -> None:
        given = [self.argument("key", "next_token", 1, 1), self.argument("heat", "next_token", 2, 1)]
        self.run("next_token", 1, [hidden, *given], self.result("token", "next_token", 1))

    def decode(self, sources: Sequence[tuple[Place, int]], most: int) -> Place:
        """Up to `most` positions of each session, whose rows lie in several places: the hidden rows of the last."""
        sizes = self.buckets["decode"]
        if not sizes:
            raise NoBucket("decode", self.batch, 1)
        n = next((n for n in sizes if n >= most), sizes[-1])
        spec = self.methods["decode"].inputs[0]
        hidden = self.space(spec, 1)
        self.rows = tuple(count for _, count in sources)
        for start in range(0, most, n):
            whole = self.space(spec, n)
            takes = [self.index("", self.batch * n) for _ in sources]
            for (place, count), index in zip(sources, takes, strict=True):
                self.links.append(Take(place, self.batch * count, index, whole, self.batch * n, spec.cols))
            counts = self.room("input", 4 * self.batch)[1]
            out, last = self.run("decode", n, [whole], at=counts), self.index("", self.batch)
            self.links.append(Take(out, self.batch * n, last, hidden, self.batch, spec.cols))
            self.pieces.append(Piece(start, n, counts, tuple(takes), last))
        return hidden

    def quiet(self) -> Place:
        self.fields["quiet"] = self.room("input", 4 * self.frame)[1]
        return "input", self.fields["quiet"]

    def clamp(self, pcm: Place, rows: int) -> Place:
        out = self.room("between", 4 * rows * self.layout.hop)
        self.links.append(Clamp(pcm, out, rows, self.layout.hop))
        return out

    # Places.

    def room(self, space: str, nbytes: int) -> Place:
        at = self.nbytes[space]
        self.nbytes[space] = at + up(nbytes)
        return space, at

    def space(self, spec: TensorSpec, n: int) -> Place:
        return self.room("between", argument_bytes(spec, self.batch, n))

    def argument(self, name: str, method: str, number: int, n: int) -> Place:
        """An input of a method that the host gives."""
        place = self.room("input", argument_bytes(self.methods[method].inputs[number], self.batch, n))
        self.fields[name] = place[1]
        return place

    def result(self, name: str, method: str, n: int) -> Place:
        place = self.room("output", argument_bytes(self.methods[method].outputs[0], self.batch, n))
        self.fields[name] = place[1]
        return place

    def index(self, name: str, count: int) -> int:
        at = self.room("input", 4 * count)[1]
        self.indices.append((at, count))
        if name:
            self.fields[name] = at
        return at

    def least(self, method: str, n: int) -> int:
        found = next((size for size in self.buckets[method] if size >= n), None)
        if found is None:
            raise NoBucket(method, self.batch, n)
        return found

    def run(
        self, method: str, n: int, inputs: Sequence[Place], out: Place | None = None, counts: str = "", at: int = -1
    ) -> Place:
        """A method, with its own counts (`counts`: under another name; `at`: some that are there)."""
        if n not in self.buckets[method]:
            raise NoBucket(method, self.batch, n)
        name = counts or method
        if at < 0:
            if name not in self.marks:
                self.marks[name] = self.room("input", 4 * self.batch)[1]
            at = self.marks[name]
        out = out or self.space(self.methods[method].outputs[0], n)
        self.links.append(Link(method, n, at, tuple(inputs), out))
        return out
