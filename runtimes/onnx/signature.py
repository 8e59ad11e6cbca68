"""`engines/onnx/signature.json`, read strictly and held against the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from tmlc.errors import PackageError, TargetError
from tmlc.package.fields import Fields, check_member_name, is_text, parse_json
from tmlc.package.manifest import DTYPES, Manifest, StateInfo
from tmlc.package.reader import Package
from tmlc.runtimes.core.backend import MethodSpec, TensorSpec

VERSION = 1
AGAIN = "Compile the checkpoint again with this version of tmlc."


@dataclass(frozen=True)
class Argument:
    """An input or output of a method; `below`: ids must be less (0: these are no ids)."""

    name: str
    spec: TensorSpec
    below: int


@dataclass(frozen=True)
class State:
    """A state of a method: the graph's input, its output (None: it is only read), and its place in the slot."""

    name: str
    next: str | None
    in_place: bool
    info: StateInfo


@dataclass(frozen=True)
class MethodGraph:
    """What the signature says of one method. `position`: the state that counts, `limit`: the most it may reach (0: no
    limit)."""

    name: str
    file: str
    max_n: int
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    states: tuple[State, ...]
    position: State | None
    limit: int

    @property
    def spec(self) -> MethodSpec:
        return MethodSpec(
            self.name, self.max_n, tuple(a.spec for a in self.inputs), tuple(a.spec for a in self.outputs)
        )


@dataclass(frozen=True)
class Signature:
    """The whole file."""

    methods: dict[str, MethodGraph]
    weights: str
    onnxruntime: str
    contrib: bool


def read_signature(package: Package, target: str) -> Signature:
    """The signature of a package's ONNX target.

    Raises:
        PackageError: damaged, or not what the manifest says.
        TargetError: of a newer version.
    """
    plan = package.manifest.targets[target].plan
    where = f"{package.path}: {plan}"
    f = Fields(parse_json(package.read(plan), where), where)
    version = f.integer("version")
    if version != VERSION:
        what = f"signature version {version} is not the {VERSION} that this tmlc reads"
        raise TargetError(what, where=where, fix=f"Upgrade tmlc (pip install -U tmlc). {AGAIN}")
    contrib = f.any("contrib")
    if not isinstance(contrib, bool):
        raise f.fail("contrib", "expected true or false")
    f.integer("opset", 1, 1000)
    methods = {}
    for name, value in f.mapping("methods").items():
        methods[name] = _method(name, Fields(value, f"{where}: methods: {name[:60]}"), package.manifest)
    out = Signature(methods, check_member_name(f.text("weights")), f.text("onnxruntime"), contrib)
    f.done()
    _check(out, package, where)
    return out


def _method(name: str, f: Fields, manifest: Manifest) -> MethodGraph:
    infos = {state.name: state for state in manifest.states}
    states = f.items("states", lambda s: _state(s, name, infos))
    position, limit = f.any("position"), 0
    counter = None
    if position is not None:
        p = Fields(position, f"{f.where}: position")
        wanted, limit = p.text("state"), p.integer("limit")
        counter = next((s for s in states if s.name == wanted), None)
        p.done()
        if counter is None or counter.info.dtype != "i64" or counter.info.bytes != 8:
            raise f.fail("position", "it is no state that counts positions")
    out = MethodGraph(
        name,
        check_member_name(f.text("file")),
        f.integer("max_n", 1, 2**24),
        f.items("inputs", _argument),
        f.items("outputs", _argument),
        states,
        counter,
        limit,
    )
    f.mapping("operators")
    f.done()
    return out


def _argument(f: Fields) -> Argument:
    a, b = f.ints("rows", 2)
    below = f.integer("below", 1, 2**31) if "below" in f.value else 0
    out = Argument(f.text("name"), TensorSpec(f.text("dtype", tuple(DTYPES)), a, b, f.integer("cols", 1)), below)
    f.done()
    return out


def _state(f: Fields, method: str, infos: dict[str, StateInfo]) -> State:
    name = f.text("name")
    info = infos.get(name)
    following, in_place = f.any("next"), f.any("in_place")
    same = info is not None and (info.method, info.dtype, info.shape) == (method, f.text("dtype"), f.ints("shape"))
    if info is None or not same:
        raise f.fail("name", f"state {name[:60]!r} is not in the manifest, or is another one there")
    if not (following is None or is_text(following)) or not isinstance(in_place, bool):
        raise f.fail("next", "expected a name and whether it may lie in place")
    f.text("initial", ("zeros",))
    f.done()
    return State(name, following, in_place, info)


def _check(found: Signature, package: Package, where: str) -> None:
    """The signature's methods and states are the manifest's."""
    manifest = package.manifest
    if set(found.methods) != {method.name for method in manifest.methods}:
        raise PackageError("its methods are not those of the manifest", where=where, fix=AGAIN)
    for info in manifest.methods:
        method = found.methods[info.name]
        same = method.max_n == info.max_n and len(set(_names(method))) == len(_names(method))
        for mine, theirs in ((method.inputs, info.inputs), (method.outputs, info.outputs)):
            wanted = [(s.name, TensorSpec(s.dtype, *s.rows, s.cols)) for s in theirs]
            same = same and [(a.name, a.spec) for a in mine] == wanted
        if not same:
            raise PackageError(f"method {info.name} is not that of the manifest", where=where, fix=AGAIN)
        if method.file not in manifest.files:
            raise PackageError(f"{method.file} is missing", where=where, fix=AGAIN)
    used = [state.name for method in found.methods.values() for state in method.states]
    if sorted(used) != sorted(state.name for state in manifest.states):
        raise PackageError("its states are not those of the manifest", where=where, fix=AGAIN)
    end = 0
    for state in sorted(manifest.states, key=lambda state: state.offset):
        if state.offset % 64:
            raise PackageError(f"state {state.name} is not at a multiple of 64 bytes", where=where, fix=AGAIN)
        if state.offset < end:
            raise PackageError(f"state {state.name} and another one share bytes", where=where, fix=AGAIN)
        end = state.offset + state.bytes


def _names(method: MethodGraph) -> list[str]:
    inputs = [a.name for a in method.inputs] + [s.name for s in method.states]
    return inputs + [a.name for a in method.outputs] + [s.next for s in method.states if s.next]
