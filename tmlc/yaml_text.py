"""YAML that a person wrote: its value, or one line that says what is wrong with it."""

from collections.abc import Callable
from typing import Any

import yaml


class YamlFault(ValueError):
    """A text that is no YAML, or not of the types that are safe to read.

    Attributes:
        what: is wrong, one line; it may quote the text.
        line: where, from 1; None where nobody knows.
    """

    def __init__(self, what: str, line: int | None) -> None:
        self.what, self.line = " ".join(what.split())[:200], line
        super().__init__(self.what if line is None else f"line {line}: {self.what}")

    def within(self, name: object) -> str:
        """`name` with the line, for the `where` of an error."""
        return str(name) if self.line is None else f"{name}, line {self.line}"


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose constructors raise anything for a scalar that its type cannot have (the date
    2026-13-45, `!!bool maybe`): here that is an error with its line, too."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            what = f"{str(node.value)[:60]!r} is not a value of the type {kind}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


def parse_yaml(text: str | bytes) -> Any:
    """The value of a text with one document. Raises YamlFault."""
    return _read(text, Loader.get_single_data)


def compose_yaml(text: str | bytes) -> yaml.Node | None:
    """Its nodes, which know their lines; None of an empty text. Raises YamlFault."""
    found: yaml.Node | None = _read(text, Loader.get_single_node)
    return found


def _read(text: str | bytes, take: Callable[[Loader], Any]) -> Any:
    try:
        return take(Loader(text if isinstance(text, str) else text.decode("utf-8-sig")))
    except UnicodeDecodeError:
        raise YamlFault("it is not UTF-8", None) from None
    except RecursionError:
        raise YamlFault("it is nested too deeply", None) from None
    except yaml.reader.ReaderError as error:
        raise YamlFault(f"a character that cannot stand there: {error.reason}", None) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or "it does not parse"
        raise YamlFault(said, None if mark is None else mark.line + 1) from None
