"""Row counts of tensors: affine functions of `n`, the number of new positions in a call of a method.

A size that does not depend on `n` is a plain `int` wherever the IR stores it; arithmetic on `Dim` keeps that
form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from tmlc.errors import IRError

__all__ = ["Dim", "Size", "at", "parse_size"]


_AFFINE = "rows are a·n + b (docs/ir.md)"


@dataclass(frozen=True, slots=True, eq=False)
class Dim:
    """The size `a·n + b`. Arithmetic is exact; where it cannot be (n·n, uneven division) it raises IRError."""

    a: int
    b: int = 0

    def at(self, n: int) -> int:
        """The size for a call with `n` new positions."""
        return self.a * n + self.b

    def __add__(self, other: Size) -> Size:
        o = _dim(other)
        return _size(self.a + o.a, self.b + o.b)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        o = _dim(other)
        return _size(self.a - o.a, self.b - o.b)

    def __rsub__(self, other: Size) -> Size:
        o = _dim(other)
        return _size(o.a - self.a, o.b - self.b)

    def __mul__(self, other: Size) -> Size:
        o = _dim(other)
        if self.a and o.a:
            fix = f"{_AFFINE}: multiply by a size that does not depend on n"
            raise IRError(f"({self}) * ({o}) is not affine in n", fix=fix)
        return _size(self.a * o.b + o.a * self.b, self.b * o.b)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Size:
        if not isinstance(other, int) or other == 0 or self.a % other or self.b % other:
            fix = f"{_AFFINE}: divide by a whole number that both a and b are multiples of"
            raise IRError(f"({self}) is not divisible by {other} for every n", fix=fix)
        return _size(self.a // other, self.b // other)

    def __mod__(self, other: int) -> int:
        if not isinstance(other, int) or other == 0 or self.a % other:
            fix = f"{_AFFINE}: take the rest by a whole number that a is a multiple of"
            raise IRError(f"({self}) mod {other} depends on n", fix=fix)
        return self.b % other

    def _order(self, other: object) -> NoReturn:
        fix = f"{_AFFINE}: give a size here that does not depend on n"
        raise IRError(f"whether ({self}) is more or less than {other} depends on n", fix=fix)

    __lt__ = __le__ = __gt__ = __ge__ = _order

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dim):
            return (self.a, self.b) == (other.a, other.b)
        return isinstance(other, int) and self.a == 0 and self.b == other

    def __hash__(self) -> int:
        return hash((self.a, self.b)) if self.a else hash(self.b)

    def __str__(self) -> str:
        if self.a == 0:
            return str(self.b)
        head = "n" if self.a == 1 else f"{self.a}n"
        return head if self.b == 0 else f"{head}{self.b:+d}"

    __repr__ = __str__


Size = int | Dim


def _dim(size: Size) -> Dim:
    if isinstance(size, Dim):
        return size
    if isinstance(size, int):
        return Dim(0, size)
    raise IRError(f"{size!r} is not a size", fix="give an int, or Dim(a, b) for a·n + b")


def _size(a: int, b: int) -> Size:
    return Dim(a, b) if a else b


def at(size: Size, n: int) -> int:
    """The number that `size` is in a call with `n` new positions."""
    return size.at(n) if isinstance(size, Dim) else int(size)


def parse_size(text: str) -> Size:
    """Reads `12`, `n`, `4n`, `4n+1`, `n-2` (the form that `str` writes). Raises IRError for anything else."""
    head, star, tail = text.strip().partition("n")
    try:
        if not star:
            return int(head)
        return _size(int(head) if head not in ("", "-") else int(head + "1"), int(tail) if tail else 0)
    except ValueError:
        raise IRError(f"{text!r} is not a size", fix="write an integer, or a*n+b as `4n+1`") from None
