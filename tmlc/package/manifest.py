"""The manifest of a package: what the engine is, what it takes and gives, and what must be true of its files.

Plain dataclasses, read strictly by hand (`tmlc.package.fields`): a manifest may come from a stranger. Neither torch nor
pydantic is imported here.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from tmlc.errors import PackageError
from tmlc.package.fields import AGAIN, Fields, check_member_name, is_text, parse_json

FORMAT_MAJOR = 1
FORMAT_MINOR = 0
KNOWN_FEATURES = frozenset(
    {
        "cpu.plan.v1",
        "weights.k16",
        "weights.k16.int8",
        "weights.k16.int4",
        "states.kv.int8",
        "onnx.graphs.v1",
        "tensorrt.plan.v1",
        "triton.chains.v1",
        "triton.overlap.v1",
        "triton.plan.v1",
        "weights.rows",
        "weights.rows.int8",
        "weights.rows.fp8",
        "weights.rows.int4",
    }
)

KINDS = ("interaction", "tokens")
DTYPES = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4, "i64": 8, "u8": 1}
POLICIES = ("ring_with_sinks", "end")
STATE_KINDS = ("position", "kv_linear", "kv_ring", "conv_tail", "audio_window", "overlap")


@dataclass(frozen=True)
class Signature:
    """One argument or result of a method: `a·n + b` rows of `cols`."""

    name: str
    dtype: str
    rows: tuple[int, int]
    cols: int

    @staticmethod
    def read(f: Fields) -> "Signature":
        a, b = f.ints("rows", 2)
        out = Signature(f.text("name"), f.text("dtype", tuple(DTYPES)), (a, b), f.integer("cols", 1))
        f.done()
        return out


@dataclass(frozen=True)
class MethodInfo:
    """One entry point of the engine; a call has 1 ≤ n ≤ max_n new positions."""

    name: str
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    max_n: int

    @staticmethod
    def read(f: Fields) -> "MethodInfo":
        out = MethodInfo(
            f.text("name"),
            f.items("inputs", Signature.read),
            f.items("outputs", Signature.read),
            f.integer("max_n", 1, 2**24),
        )
        f.done()
        return out


@dataclass(frozen=True)
class StateInfo:
    """A piece of the session's slot: `bytes` at `offset`, zeros when a session starts."""

    name: str
    kind: str
    method: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @staticmethod
    def read(f: Fields) -> "StateInfo":
        out = StateInfo(
            f.text("name"),
            f.text("kind", STATE_KINDS),
            f.text("method"),
            f.text("dtype", tuple(DTYPES)),
            f.ints("shape", low=1),
            f.integer("offset"),
            f.integer("bytes", 1),
        )
        f.done()
        if math.prod(out.shape) * DTYPES[out.dtype] != out.bytes:
            raise f.fail("bytes", "does not fit shape and dtype")
        return out


@dataclass(frozen=True)
class TickLayout:
    """What a tick holds. Counts of positions in and out, the tokens with a meaning, and the form of audio and
    video.

    A model without a modality has zeros there (`audio_in`, `video_positions`, `audio_out` = 0), a token that
    does not exist is -1.
    """

    duration_ms: int
    audio_in: int = 0
    video_every: int = 0
    text_in: int = 0
    text_out: int = 1
    audio_out: int = 0
    silence_token_id: int = -1
    end_of_tick_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    sample_rate: int = 0
    hop: int = 0
    clip_frames: int = 0
    frame_height: int = 0
    frame_width: int = 0
    video_positions: int = 0
    out_sample_rate: int = 0
    out_hop: int = 0
    frames_per_position: int = 0
    n_mel: int = 0
    silence_level: float = 0.0

    @staticmethod
    def read(f: Fields) -> "TickLayout":
        out = TickLayout(
            duration_ms=f.integer("duration_ms", 1, 60_000),
            audio_in=f.integer("audio_in", 0, 4096),
            video_every=f.integer("video_every", 0, 4096),
            text_in=f.integer("text_in", 0, 4096),
            text_out=f.integer("text_out", 0, 4096),
            audio_out=f.integer("audio_out", 0, 4096),
            silence_token_id=f.integer("silence_token_id", -1, 2**31 - 1),
            end_of_tick_token_id=f.integer("end_of_tick_token_id", -1, 2**31 - 1),
            eos_token_ids=f.ints("eos_token_ids"),
            sample_rate=f.integer("sample_rate", 0, 2**20),
            hop=f.integer("hop", 0, 2**20),
            clip_frames=f.integer("clip_frames", 0, 4096),
            frame_height=f.integer("frame_height", 0, 2**15),
            frame_width=f.integer("frame_width", 0, 2**15),
            video_positions=f.integer("video_positions", 0, 2**20),
            out_sample_rate=f.integer("out_sample_rate", 0, 2**20),
            out_hop=f.integer("out_hop", 0, 2**20),
            frames_per_position=f.integer("frames_per_position", 0, 4096),
            n_mel=f.integer("n_mel", 0, 4096),
            silence_level=f.number("silence_level"),
        )
        f.done()
        return out


@dataclass(frozen=True)
class ContextInfo:
    """How many positions a session keeps, and what happens at the bound."""

    limit: int
    policy: str
    sinks: int
    max_append: int

    @staticmethod
    def read(f: Fields) -> "ContextInfo":
        out = ContextInfo(
            f.integer("limit", 1, 2**40),
            f.text("policy", POLICIES),
            f.integer("sinks", 0, 2**40),
            f.integer("max_append", 1, 2**24),
        )
        f.done()
        return out


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes the engine needs: once for weights, arena and scratch, and `session_bytes` for each session."""

    weight_bytes: int
    arena_bytes: int
    scratch_bytes: int

    @staticmethod
    def read(f: Fields) -> "MemoryInfo":
        out = MemoryInfo(f.integer("weight_bytes"), f.integer("arena_bytes"), f.integer("scratch_bytes"))
        f.done()
        return out


@dataclass(frozen=True)
class TargetInfo:
    """One engine inside the package."""

    plan: str
    precision: str
    layout: str

    @staticmethod
    def read(f: Fields) -> "TargetInfo":
        out = TargetInfo(check_member_name(f.text("plan")), f.text("precision"), f.text("layout"))
        f.done()
        return out


@dataclass(frozen=True)
class FileInfo:
    """Size and digest of one member of the package."""

    bytes: int
    sha256: str

    @staticmethod
    def read(f: Fields) -> "FileInfo":
        out = FileInfo(f.integer("bytes"), f.text("sha256"))
        f.done()
        if not re.fullmatch(r"[0-9a-f]{64}", out.sha256):
            raise f.fail("sha256", "expected 64 hexadecimal digits")
        return out


@dataclass(frozen=True)
class ModelInfo:
    """Which model this is, and the digests of the checkpoint files it was made from."""

    name: str
    kind: str
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All that is known of a package without reading its weights; `manifest.json` is its text form."""

    model: ModelInfo
    methods: tuple[MethodInfo, ...]
    states: tuple[StateInfo, ...]
    session_bytes: int
    tick: TickLayout
    context: ContextInfo
    memory: MemoryInfo
    targets: dict[str, TargetInfo]
    tolerances: dict[str, float]
    tokenizer: str | None = None
    producer: dict[str, str] = field(default_factory=dict)
    pipeline: tuple[dict[str, Any], ...] = ()
    files: dict[str, FileInfo] = field(default_factory=dict)
    required_features: tuple[str, ...] = ()
    major: int = FORMAT_MAJOR
    minor: int = FORMAT_MINOR

    def method(self, name: str) -> MethodInfo:
        """The method of that name. Raises PackageError when the package has none."""
        for method in self.methods:
            if method.name == name:
                return method
        raise PackageError(
            f"the package has no method {name!r}",
            where=self.model.name,
            fix=f"Its methods: {', '.join(m.name for m in self.methods)}.",
        )

    def has_method(self, name: str) -> bool:
        return any(method.name == name for method in self.methods)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON objects, `format` first; `parse_manifest` reads it back."""
        body = asdict(self)
        head = {"major": body.pop("major"), "minor": body.pop("minor")}
        head["required_features"] = body.pop("required_features")
        model = body.pop("model")
        model["source"] = {"files": model["source"]}
        return {"format": head, "producer": body.pop("producer"), "model": model, **body}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _texts(f: Fields, key: str) -> dict[str, str]:
    value = f.mapping(key)
    if not all(map(is_text, value.values())):
        raise f.fail(key, "expected texts")
    return value


def _check_format(f: Fields) -> tuple[int, int, tuple[str, ...]]:
    head = Fields(f.any("format"), f"{f.where}: format", lenient=True)
    major, minor = head.integer("major"), head.integer("minor")
    if major > FORMAT_MAJOR:
        raise PackageError(
            f"package format {major}.{minor} is newer than this tmlc reads ({FORMAT_MAJOR}.{FORMAT_MINOR})",
            where=f.where,
            fix="Upgrade tmlc (pip install -U tmlc), or compile the checkpoint again with this version.",
        )
    if major < FORMAT_MAJOR:
        raise PackageError(f"package format {major}.{minor} is not known", where=f.where, fix=AGAIN)
    features = head.sequence("required_features")
    unknown = [str(v)[:60] for v in features if not isinstance(v, str) or v not in KNOWN_FEATURES]
    if unknown:
        raise PackageError(
            f"the package requires a feature this tmlc does not have: {unknown[0]}",
            where=f.where,
            fix="Upgrade tmlc (pip install -U tmlc), or compile the checkpoint again with this version.",
        )
    return major, minor, tuple(features)


def parse_manifest(data: bytes, where: str = "manifest.json") -> Manifest:
    """Reads and checks a manifest. Fields that a newer minor version added are ignored; otherwise all must be
    known.

    Raises:
        PackageError: newer major version, unknown required feature, or any field missing, mistyped or out of
        range.
    """
    f = Fields(parse_json(data, where), where)
    major, minor, features = _check_format(f)
    f.lenient = minor > FORMAT_MINOR

    model = f.nested("model")
    source = model.nested("source")
    info = ModelInfo(model.text("name"), model.text("kind", KINDS), _texts(source, "files"))
    source.done()
    model.done()

    pipeline = f.sequence("pipeline")
    for entry in pipeline:
        if not isinstance(entry, dict) or not is_text(entry.get("pass", "")):
            raise f.fail("pipeline", "expected a list of objects that name a pass")
        if not isinstance(entry.get("config", {}), dict) or not isinstance(entry.get("near_misses", []), list):
            raise f.fail("pipeline", "expected settings and near misses")
    tolerances = f.nested("tolerances")
    tokenizer = f.any("tokenizer")
    targets = {
        name: TargetInfo.read(Fields(value, f"{where}: targets: {name}", f.lenient))
        for name, value in f.mapping("targets").items()
    }
    files = {
        check_member_name(name): FileInfo.read(Fields(value, f"{where}: files: {name}", f.lenient))
        for name, value in f.mapping("files").items()
    }
    manifest = Manifest(
        model=info,
        methods=f.items("methods", MethodInfo.read),
        states=f.items("states", StateInfo.read),
        session_bytes=f.integer("session_bytes"),
        tick=TickLayout.read(f.nested("tick")),
        context=ContextInfo.read(f.nested("context")),
        memory=MemoryInfo.read(f.nested("memory")),
        targets=targets,
        tolerances={name: tolerances.number(name) for name in tolerances.value},
        tokenizer=None if tokenizer is None else check_member_name(tokenizer),
        producer=_texts(f, "producer"),
        pipeline=tuple(pipeline),
        files=files,
        required_features=features,
        major=major,
        minor=minor,
    )
    f.done()
    _check_whole(manifest, f)
    return manifest


def _check_whole(m: Manifest, f: Fields) -> None:
    """What no single field shows: names twice, states outside the slot, files named and not there."""
    names = [method.name for method in m.methods]
    if len(set(names)) != len(names):
        raise f.fail("methods", "a method is given twice")
    states = [state.name for state in m.states]
    if len(set(states)) != len(states):
        raise f.fail("states", "a state is given twice")
    for state in m.states:
        if state.offset + state.bytes > m.session_bytes:
            raise f.fail("states", f"{state.name[:60]} lies outside the session's {m.session_bytes} bytes")
    wanted = [target.plan for target in m.targets.values()] + ([m.tokenizer] if m.tokenizer else [])
    for name in wanted:
        if name not in m.files:
            raise f.fail("files", f"{name} is used and not listed")
