"""The text form of a program: stable, one statement a line, and read back to the same program.

    tmlc-ir 1
    meta {"kind": "tokens"}
    facts canonical
    weight "norm" = source("model.norm.weight") : f32[64]
    state "position" : i64[1, 1] kind=position method=decode init=zeros
    method decode(max_n=64) {
      %x = input "x" : f32[n, 64]
      %norm = weight "norm" : f32[64]
      %rms_norm = rms_norm(%x, %norm, eps=1e-06) : f32[n, 64]
      return %rms_norm
    }

A call may end with `@arena=[offset, bytes]` and `@source="where in the model it comes from"`.
Blank lines and lines that begin with `#` are skipped. Where the parser can infer a type (of op calls, of
weights other than sources, of weight and state placeholders) it may be left out.
"""

from __future__ import annotations

import json
import operator
import re
from typing import Any

from torch import fx

from tmlc.errors import IRError
from tmlc.ir.ops import OPS, spec_of
from tmlc.ir.program import FIX_CALL, Fact, Method, PassRecord, Program, StateSpec, infer_type, positional, role
from tmlc.ir.types import TensorType, ValueType, parse_type
from tmlc.ir.weights import WeightEntry, WeightMap, infer_weight

__all__ = ["parse_program", "print_program"]

HEADER = "tmlc-ir 1"
#: What each statement looks like, for who wrote one that cannot be read.
FORMS = {
    "meta": 'meta {"kind": "tokens"}',
    "facts": "facts canonical stateful",
    "record": 'record {"pass": "fuse.swiglu", "matches": 2}',
    "weight": 'weight "norm" = source("model.norm.weight") : f32[64]',
    "state": 'state "position" : i64[1, 1] kind=position method=decode init=zeros',
    "method": 'method decode(max_n=64) {\n%x = input "x" : f32[n, 64]\n%y = silu(%x) : f32[n, 64]\nreturn %y\n}',
}
_ONCE = "take one of the two out, or give it another name"


def print_program(
    program: Program, *, record: bool = True, numbered: bool = False, sources: bool = True
) -> str:
    """The program as text.

    Args:
        record: include the records of the passes.
        sources: include the places in the model's code that calls come from.
        numbered: name values %0, %1, … so that two programs of one structure print alike.
    """
    lines = [HEADER, f"meta {json.dumps(program.meta, sort_keys=True)}"]
    lines.append(" ".join(["facts", *sorted(program.facts)]))
    if record:
        lines += [f"record {json.dumps(entry.to_json())}" for entry in program.record]
    lines += [_weight(entry) for _, entry in program.weights.items()]
    for s in program.states.values():
        lines.append(f"state {_quote(s.name)} : {s.type} kind={s.kind} method={s.method} init={s.init}")
    for method in program.methods.values():
        lines += _method(method, numbered, sources)
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _weight(entry: WeightEntry) -> str:
    args = [_quote(src) for src in entry.srcs] + [f"{k}={json.dumps(v)}" for k, v in entry.args.items()]
    return f"weight {_quote(entry.dst)} = {entry.op}({', '.join(args)}) : {entry.type}"


def _method(method: Method, numbered: bool, sources: bool) -> list[str]:
    names = {n: f"%{i if numbered else n.name}" for i, n in enumerate(method.graph.nodes)}
    lines = [f"method {method.name}(max_n={method.max_n}) {{"]
    for node in method.graph.nodes:
        if node.op == "output":
            lines.append(f"  return {', '.join(names[value] for value in method.outputs)}")
            continue
        if node.op == "placeholder":
            kind, name = role(node)
            body = f"{kind} {_quote(name)}"
        else:
            body = _call(node, names)
        arena = f" @arena={json.dumps(node.meta['arena'])}" if "arena" in node.meta else ""
        source = f" @source={_quote(node.meta['source'])}" if sources and node.meta.get("source") else ""
        lines.append(f"  {names[node]} = {body} : {_type(node.meta['type'])}{arena}{source}")
    return [*lines, "}"]


def _type(value: ValueType) -> str:
    return str(value) if isinstance(value, TensorType) else f"({', '.join(map(str, value))})"


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.target is operator.getitem:
        return f"item({names[node.args[0]]}, {node.args[1]})"  # type: ignore[index]
    spec = spec_of(node.target)
    if spec is None:
        raise IRError(f"{node.target} is not a canonical op", where=node.name, fix=FIX_CALL)
    args: list[str] = []
    named = False  # a tensor behind a named argument is named too
    for name, value in zip(spec.args, node.args, strict=True):
        if value is None or isinstance(value, fx.Node):
            shown = "none" if value is None else names[value]
            args.append(f"{name}={shown}" if named else shown)
        else:
            named = True
            args.append(f"{name}={json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return f"{spec.name}({', '.join(args)})"


def parse_program(text: str) -> Program:
    """Reads what print_program writes. Raises IRError naming the line; the result still wants `verify`."""
    return _Parser(text).program()


class _Parser:
    """One pass over the lines; `at` is the place in the current one."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.number = 0
        self.line, self.at = "", 0
        self.kind = ""  # of the statement that is being read
        self.decoder = json.JSONDecoder()
        self.result = Program({}, WeightMap())
        self.entries: dict[str, WeightEntry] = {}

    def program(self) -> Program:
        try:
            if not self.next_line() or self.line.strip() != HEADER:
                raise IRError(f"the first line is not {HEADER!r}", fix="this tmlc reads version 1 of the text form")
            while self.next_line():
                self.statement()
        except IRError as error:
            raise IRError(error.what, where=f"line {self.number}", fix=error.fix) from None
        self.result.weights = WeightMap(self.entries.values())
        return self.result

    def next_line(self) -> bool:
        while self.number < len(self.lines):
            self.line, self.at = self.lines[self.number].strip(), 0
            self.number += 1
            if self.line and not self.line.startswith("#"):
                return True
        return False

    def wrong(self, what: str) -> IRError:
        """The error of a statement that is not in its form."""
        if self.kind not in FORMS:
            return IRError(what, fix=f"begin a line with {', '.join(FORMS)}, or # for a comment")
        lines = FORMS[self.kind].split("\n")
        return IRError(what, fix=f"write it as `{'`, `'.join(lines)}`" + (", a line each" if lines[1:] else ""))

    # Tokens

    def skip(self) -> None:
        while self.at < len(self.line) and self.line[self.at] == " ":
            self.at += 1

    def accept(self, token: str) -> bool:
        self.skip()
        if not self.line.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.wrong(f"{token!r} expected at {self.line[self.at : self.at + 30]!r}")

    def match(self, pattern: str, what: str) -> str:
        self.skip()
        found = re.compile(pattern).match(self.line, self.at)
        if not found:
            raise self.wrong(f"{what} expected at {self.line[self.at : self.at + 30]!r}")
        self.at = found.end()
        return found.group()

    def word(self) -> str:
        return self.match(r"[A-Za-z_][\w.]*", "a name")

    def json(self) -> Any:
        self.skip()
        try:
            value, self.at = self.decoder.raw_decode(self.line, self.at)
        except ValueError:
            raise self.wrong(f"a JSON value expected at {self.line[self.at : self.at + 30]!r}") from None
        return value

    def string(self) -> str:
        value = self.json()
        if not isinstance(value, str):
            raise self.wrong(f"a quoted name expected, not {value!r}")
        return value

    def tensor(self) -> TensorType:
        return parse_type(self.match(r"\w+\[[^\]]*\]", "a tensor type"))

    def value_type(self) -> ValueType:
        if not self.accept("("):
            return self.tensor()
        types: list[TensorType] = []
        while not self.accept(")"):
            if types:
                self.expect(",")
            types.append(self.tensor())
        return tuple(types)

    def end(self) -> None:
        self.skip()
        if self.at < len(self.line):
            raise self.wrong(f"unexpected {self.line[self.at : self.at + 30]!r}")

    # Statements

    def statement(self) -> None:
        self.kind = ""
        self.kind = kind = self.word()
        if kind == "meta":
            self.result.meta = self.mapping()
        elif kind == "facts":
            words = self.line[self.at :].split()
            unknown = [word for word in words if word not in set(Fact)]
            if unknown:
                raise IRError(f"unknown fact {unknown[0]!r}", fix=f"use {', '.join(Fact)}")
            self.result.facts, self.at = frozenset(Fact(word) for word in words), len(self.line)
        elif kind == "record":
            self.result.record.append(self.record())
        elif kind == "weight":
            self.weight()
        elif kind == "state":
            self.state()
        elif kind == "method":
            self.method()
        else:
            raise self.wrong(f"unknown statement {kind!r}")
        self.end()

    def mapping(self) -> dict[str, Any]:
        value = self.json()
        if not isinstance(value, dict):
            raise self.wrong("a JSON object expected")
        return value

    def record(self) -> PassRecord:
        try:
            return PassRecord.from_json(self.mapping())
        except (KeyError, TypeError):
            raise self.wrong("not a pass record") from None

    def weight(self) -> None:
        dst = self.string()
        self.expect("=")
        op = self.word()
        srcs: list[str] = []
        args: dict[str, Any] = {}
        self.expect("(")
        while not self.accept(")"):
            if srcs or args:
                self.expect(",")
            self.skip()
            if self.line.startswith('"', self.at):
                srcs.append(self.string())
            else:
                key = self.word()
                self.expect("=")
                args[key] = self.json()
        made = self.tensor() if self.accept(":") else None
        if made is None:
            if op == "source" or any(src not in self.entries for src in srcs):
                raise IRError(f"weight {dst!r} needs a type", fix="add it: ` : f32[64]`")
            made = infer_weight(dst, op, [self.entries[src].type for src in srcs], args)
        if dst in self.entries:
            raise IRError(f"weight {dst!r} is declared twice", fix=_ONCE)
        self.entries[dst] = WeightEntry(dst, op, tuple(srcs), args, made.dtype, made.shape)

    def state(self) -> None:
        name = self.string()
        self.expect(":")
        made = self.tensor()
        fields = {}
        for key in ("kind", "method", "init"):
            self.expect(key)
            self.expect("=")
            fields[key] = self.word()
        if name in self.result.states:
            raise IRError(f"state {name!r} is declared twice", fix=_ONCE)
        self.result.states[name] = StateSpec(name=name, shape=made.shape, dtype=made.dtype, **fields)

    def method(self) -> None:
        name = self.word()
        self.expect("(")
        self.expect("max_n")
        self.expect("=")
        max_n = int(self.match(r"\d+", "a number"))
        self.expect(")")
        self.expect("{")
        self.end()
        if name in self.result.methods:
            raise IRError(f"method {name!r} is declared twice", fix=_ONCE)
        graph = fx.Graph()
        values: dict[str, fx.Node] = {}
        while True:
            if not self.next_line():
                raise self.wrong(f"method {name} has no end")
            if self.accept("}"):
                break
            if self.accept("return"):
                returned = [self.reference(values)]
                while self.accept(","):
                    returned.append(self.reference(values))
                graph.output(tuple(returned))
            else:
                self.assignment(graph, values)
            self.end()
        self.result.methods[name] = Method(name, graph, max_n)

    def places(self) -> tuple[int, int] | list[tuple[int, int]]:
        """(offset, bytes), or a list of them for a call with none or several results; JSON has only lists."""
        value = self.json()
        several = value == [] or (isinstance(value, list) and isinstance(value[0], list))
        found = [tuple(place) if isinstance(place, list) else () for place in (value if several else [value])]
        for place in found:
            if len(place) != 2 or not all(type(number) is int and number >= 0 for number in place):
                raise IRError(f"no place in the arena: {str(value)[:60]}", fix="write `@arena=[offset, bytes]`")
        return found if several else found[0]

    def reference(self, values: dict[str, fx.Node]) -> fx.Node:
        name = self.match(r"%\w+", "a value")
        if name not in values:
            raise IRError(f"{name} is not defined before this line", fix="define it on a line before, in its method")
        return values[name]

    def assignment(self, graph: fx.Graph, values: dict[str, fx.Node]) -> None:
        name = self.match(r"%\w+", "a value")
        if name in values:
            raise IRError(f"{name} is defined twice", fix=_ONCE)
        self.expect("=")
        op = self.word()
        label = name[1:] if not name[1:].isdigit() else f"v{name[1:]}"
        if op in ("input", "weight", "state"):
            node, inferred = self.placeholder(graph, op, label)
        else:
            node, inferred = self.call(graph, op, label, values)
        if self.accept(":"):
            inferred = self.value_type()
        if inferred is None:
            raise IRError(f"{name} needs a type", fix="add it: ` : f32[n, 64]`")
        node.meta["type"] = inferred
        if self.accept("@arena="):
            node.meta["arena"] = self.places()
        if self.accept("@source="):
            node.meta["source"] = self.string()
        values[name] = node

    def placeholder(self, graph: fx.Graph, kind: str, label: str) -> tuple[fx.Node, ValueType | None]:
        name = self.string()
        node = graph.create_node("placeholder", label, name=label)
        node.meta["role"] = (kind, name)
        tables: dict[str, dict[str, Any]] = {"weight": self.entries, "state": self.result.states, "input": {}}
        declared = tables[kind]
        return node, declared[name].type if name in declared else None

    def call(
        self, graph: fx.Graph, op: str, label: str, values: dict[str, fx.Node]
    ) -> tuple[fx.Node, ValueType | None]:
        args, kwargs = self.arguments(values)
        if op == "item":
            if kwargs or len(args) != 2 or not isinstance(args[0], fx.Node) or type(args[1]) is not int:
                raise IRError("item takes a value and a number", fix="write `item(%value, 0)`")
            node = graph.create_node("call_function", operator.getitem, tuple(args), {}, name=label)
            types = args[0].meta["type"]
            known = isinstance(types, tuple) and 0 <= args[1] < len(types)
            return node, types[args[1]] if known else None
        if op not in OPS:
            raise IRError(f"unknown op {op!r}", fix="see docs/ir.md for the canonical ops")
        spec = OPS[op]
        filled = positional(spec, args, kwargs)
        node = graph.create_node("call_function", spec.overload, filled, {}, name=label)
        typed = re.compile(r" *:").match(self.line, self.at)
        return node, None if typed else infer_type(spec, filled)

    def arguments(self, values: dict[str, fx.Node]) -> tuple[list[Any], dict[str, Any]]:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        self.expect("(")
        while not self.accept(")"):
            if args or kwargs:
                self.expect(",")
            self.skip()
            keyword = re.compile(r"(\w+) *= *").match(self.line, self.at)
            if keyword:
                self.at = keyword.end()
            if self.line.startswith("%", self.at):
                value: Any = self.reference(values)
            else:
                value = None if self.accept("none") else self.json()
            if keyword:
                kwargs[keyword.group(1)] = value
            elif kwargs:
                raise IRError("a positional argument after a named one", fix="name it too, or put it first")
            else:
                args.append(value)
        return args, kwargs
